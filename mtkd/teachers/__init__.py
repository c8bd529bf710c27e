"""Stored teacher embeddings: a folder that is filled once and read in random batches."""

from .format import hash_ids
from .store import TeacherStore

__all__ = ["TeacherStore", "hash_ids"]
