"""Benchmarks: ``python -m benchmarks gaussian_nll`` and ``python -m benchmarks --help``."""
