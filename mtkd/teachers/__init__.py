"""Stored teacher embeddings: a folder that is filled once and read in random batches."""

from .embed import embed
from .exchange import from_arrays, from_dataset, to_dataset, to_npy
from .format import hash_ids
from .reading import ResidentStore
from .store import TeacherStore

__all__ = [
    "ResidentStore",
    "TeacherStore",
    "embed",
    "from_arrays",
    "from_dataset",
    "hash_ids",
    "to_dataset",
    "to_npy",
]
