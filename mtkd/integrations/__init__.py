"""Adapters to other libraries' trainers; each file is one library's, named as it is."""
