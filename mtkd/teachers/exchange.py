"""Stores from arrays and from Hugging Face datasets, and back."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .aside import making, replacing
from .files import make_array, parts, write_at
from .store import Dtype, TeacherStore

Array = npt.NDArray[Any]
CHUNK = 4096  # rows


def from_arrays(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Any],
    *,
    dtype: Dtype | Mapping[str, Dtype] = "float16",
    revision: Mapping[str, str] | None = None,
    ids: Iterable[str | int] | None = None,
) -> TeacherStore:
    """Make a store of one array ``(rows, D_t)`` a teacher, such as sentence-transformers gives.

    Args:
        path: the store's folder, new or empty.
        arrays: by teacher, a NumPy array, a tensor, or the path of an ``.npy`` file, which is read
            by memory map and without pickle.
        dtype: how numbers are stored, as in `TeacherStore.create`.
        revision: the revision of each model.
        ids: the id of each row.

    Returns:
        The store, with every row present.

    Raises:
        ValueError: arrays that are not two-dimensional or have different numbers of rows, NaN,
            infinity or overflow. Then nothing is left behind.
        TypeError: arrays without names, or that are no arrays.

    Note:
        Rows are read and written some thousands at a time.

    Example:
        >>> import tempfile, numpy as np
        >>> from mtkd.teachers import from_arrays
        >>> embeddings = np.random.randn(6, 4).astype(np.float32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = from_arrays(f"{folder}/store", {"minilm": embeddings})
        ...     print(store.dims, len(store))
        {'minilm': 4} 6
    """
    if not isinstance(arrays, Mapping):
        kind = type(arrays).__name__
        raise TypeError(f"arrays: expected a mapping from teachers to arrays, got {kind}")
    if not arrays:
        raise ValueError("arrays: expected at least one teacher, got none")
    opened = {name: _open(name, array) for name, array in arrays.items()}
    counts = {name: len(array) for name, array in opened.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"arrays: expected as many rows of every teacher, got {counts}")
    rows = next(iter(counts.values()))
    dims = {name: array.shape[1] for name, array in opened.items()}
    with making(path) as aside:
        store = TeacherStore.create(aside, dims, rows, dtype=dtype, revision=revision, ids=ids)
        for name, array in opened.items():
            for part in parts(rows, CHUNK):
                store.append(name, array[part], range(part.start, part.stop))
    return TeacherStore.open(path)


def to_npy(store: TeacherStore, teacher: str, path: str | os.PathLike[str]) -> None:
    """Write a teacher's rows to a plain ``.npy`` file ``(rows, D_t)``.

    Args:
        store: the store.
        teacher: its name there. bfloat16 and int8 are written as float32.
        path: the file; one that is there is replaced.

    Raises:
        ValueError: rows that are absent, a path inside the store.
        OSError: the disk has not the room. What was there stays.
    """
    target = Path(path).resolve()
    if store.path in target.parents:
        raise ValueError(f"path: expected a file outside the store, got {target}")
    own = store.subset([teacher])
    absent = int((~own.present(teacher)).sum())
    if absent:
        raise ValueError(f"{teacher}: expected every row to be present, got {absent} absent")
    kind = np.float16 if str(own.dtype) == "torch.float16" else np.float32
    shape = (len(own), own.dims[teacher])
    with replacing(target) as aside:
        make_array(aside, np.dtype(kind), shape)
        with open(aside, "r+b") as file:
            file.seek(0, os.SEEK_END)
            start = file.tell() - np.dtype(kind).itemsize * shape[0] * shape[1]
            for part in parts(len(own), CHUNK):
                rows = _array(own[part][0])
                write_at(file.fileno(), start + part.start * rows[0].nbytes, rows)
            os.fsync(file.fileno())


def from_dataset(
    path: str | os.PathLike[str],
    dataset: Any,
    columns: Sequence[str] | Mapping[str, str],
    *,
    dtype: Dtype | Mapping[str, Dtype] = "float16",
    revision: Mapping[str, str] | None = None,
    ids: Iterable[str | int] | None = None,
) -> TeacherStore:
    """Make a store of the embedding columns of a Hugging Face dataset.

    Args:
        path: the store's folder, new or empty.
        dataset: a ``datasets.Dataset``; a row without an embedding (None) stays absent.
        columns: names of the columns, which name the teachers too; or teacher -> column.
        dtype: how numbers are stored, as in `TeacherStore.create`.
        revision: the revision of each model.
        ids: the id of each row.

    Returns:
        The store.

    Raises:
        ValueError: an unknown column, lists of different lengths, NaN, infinity or overflow. Then
            nothing is left behind.
        TypeError: one name that is not in a list.
    """
    if isinstance(columns, str):
        raise TypeError(f"columns: expected several names, such as [{columns!r}], got a string")
    named = columns if isinstance(columns, Mapping) else dict(zip(columns, columns, strict=True))
    unknown = [column for column in named.values() if column not in dataset.column_names]
    if unknown:
        raise ValueError(f"columns: expected some of {dataset.column_names}, got {unknown}")
    plain = dataset.with_format("arrow")
    dims = {name: _width(plain, column) for name, column in named.items()}
    with making(path) as aside:
        store = TeacherStore.create(
            aside, dims, len(dataset), dtype=dtype, revision=revision, ids=ids
        )
        for name, column in named.items():
            for part in parts(len(dataset), CHUNK):
                rows, values = _lists(plain[part][column], column, dims[name])
                store.append(name, values, part.start + rows)
    return TeacherStore.open(path)


def to_dataset(store: TeacherStore, dataset: Any = None) -> Any:
    """Return a Hugging Face dataset with one embedding column a teacher; needs datasets.

    Args:
        store: the store.
        dataset: a ``datasets.Dataset`` of as many rows, to which the columns are added.

    Returns:
        A ``datasets.Dataset`` in memory; an absent row is None. float16 stays what it is, all else
        becomes float32.
    """
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise ImportError("to_dataset: expected the package datasets, which is missing") from error
    if dataset is not None and len(dataset) != len(store):
        expected = f"{len(store)} rows like the store"
        raise ValueError(f"dataset: expected {expected}, got {len(dataset)}")
    columns = {}
    for name, width in store.dims.items():
        targets, mask = store.subset([name])[:]
        flat = pyarrow.array(_array(targets).reshape(-1))
        absent = pyarrow.array(~mask[:, 0].numpy())
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(flat, width, mask=absent)
    made = datasets.Dataset(pyarrow.table(columns))
    return made if dataset is None else datasets.concatenate_datasets([dataset, made], axis=1)


def _open(name: str, array: Any) -> Any:
    if isinstance(array, (str, os.PathLike)):
        try:
            array = np.load(path := Path(array), mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{name}: expected a plain .npy file, got {path}: {error}") from None
    if not isinstance(array, (Tensor, np.ndarray)):
        kind = type(array).__name__
        raise TypeError(f"{name}: expected an array, a tensor or the path of a file, got {kind}")
    if array.ndim != 2:
        raise ValueError(f"{name}: expected shape (rows, width), got shape {tuple(array.shape)}")
    return array


def _array(targets: Tensor) -> Array:
    """Targets as NumPy has them; it has no bfloat16."""
    return (targets.float() if str(targets.dtype) == "torch.bfloat16" else targets).numpy()


def _width(dataset: Any, column: str) -> int:
    """The length of the first list of a column."""
    for part in parts(len(dataset), CHUNK):
        for each in dataset[part][column]:
            if each.is_valid:
                return len(each)
    raise ValueError(f"{column}: expected at least one embedding, got none")


def _lists(column: Any, name: str, width: int) -> tuple[Array, Array]:
    """Which rows of an Arrow column have a list, and these as an array."""
    there = np.flatnonzero(column.is_valid().to_numpy())
    lengths = {len(each) for each in column if each.is_valid}
    if lengths - {width}:
        raise ValueError(f"{name}: expected lists of {width} numbers, got lengths {lengths}")
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return there, flat.reshape(len(there), width)
