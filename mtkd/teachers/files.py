"""Files that survive a kill and a full disk: allocated at once, written in order, checked first."""

import errno
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .mapping import map_file

Array = npt.NDArray[Any]
_ZEROS = 1 << 24  # bytes written at once where nothing can be allocated, or looked at
_HEADER = 128  # bytes of the headers that `make_array` writes


def make_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Make an .npy file of zeros whose room on the disk is taken now."""
    with open(path, "xb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        size = _bytes(dtype, shape)
        try:
            _allocate(file.fileno(), file.tell(), size)
        except OSError as error:
            raise _no_room(error, path, size) from None
        except OverflowError:  # no file system counts so far
            large = OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            raise _no_room(large, path, size) from None
        os.fsync(file.fileno())


def is_blank(path: Path) -> bool:
    """Whether a file is one that `make_array` made, or began, and nobody wrote to."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(_HEADER)
        if not start.startswith(np.lib.format.MAGIC_PREFIX[: len(start)]):
            return False
        return all(block.count(0) == len(block) for block in iter(lambda: file.read(_ZEROS), b""))


def _no_room(error: OSError, path: Path, size: int) -> OSError:
    return OSError(error.errno, f"{error.strerror}: expected room for {size} bytes", str(path))


def _allocate(descriptor: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        return os.posix_fallocate(descriptor, start, size)
    for done in range(0, size, _ZEROS):
        write_at(descriptor, start + done, bytes(min(_ZEROS, size - done)))


@dataclass(frozen=True)
class Place:
    """Where rows are written: the very file that is mapped, and where its numbers begin."""

    path: Path
    start: int
    file: tuple[int, ...]

    @contextmanager
    def opened(self, flags: int) -> Iterator[int]:
        """Open the file again; another one of the same name is an error."""
        try:
            descriptor = os.open(self.path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise
            raise self._replaced(os.strerror(error.errno)) from None
        try:
            if _identity(descriptor) != self.file:
                raise self._replaced("another one")
            yield descriptor
        finally:
            os.close(descriptor)

    def _replaced(self, got: str) -> ValueError:
        expected = "the file that was opened with the store"
        return ValueError(f"{self.path}: expected {expected}, got {got}; open the store again")


def _identity(descriptor: int) -> tuple[int, ...]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size


def open_array(
    root: Path, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> tuple[Array, Place]:
    """Map an .npy file of a folder read-only, once its place, header and size are as expected."""
    with open_inside(root, name) as file:
        expected = _bytes(dtype, shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = _header(root / name, file)
        if got != (shape, False, dtype):
            order = "Fortran" if got[1] else "C"
            raise ValueError(
                f"{root / name}: expected {dtype} of shape {shape} in C order,"
                f" got {got[2]} of shape {got[0]} in {order} order"
            )
        expected += file.tell()
        size = os.fstat(file.fileno()).st_size
        if size != expected:
            raise ValueError(f"{root / name}: expected {expected} bytes, got {size}")
        place = Place(root / name, file.tell(), _identity(file.fileno()))
        content = map_file(root / name, file.fileno(), size)
        return content[place.start :].view(dtype).reshape(shape), place


def _header(path: Path, file: Any) -> tuple[Any, ...]:
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"format version {version}")
        return np.lib.format.read_array_header_1_0(file, max_header_size=4096)
    except Exception as error:  # NumPy's parser raises whatever the bytes led it to
        raise ValueError(f"{path}: expected an .npy header, got {error}") from None


def _bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def open_inside(root: Path, name: str) -> Any:
    """Open a regular file of a folder for reading; links that lead elsewhere are refused."""
    path = root / name
    expected = os.path.join(os.path.realpath(root), *name.split("/"))
    if os.path.realpath(path) != expected:
        raise ValueError(f"{path}: expected a file of this folder, got a link to elsewhere")
    try:
        # Not blocking: a named pipe must not hold up the check.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: expected a regular file, got something else")
    return os.fdopen(descriptor, "rb")


def write_at(descriptor: int, offset: int, data: Any) -> None:
    """Write bytes at an offset, whole or with an OSError."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def write_rows(place: Place, rows: Array, data: Array) -> None:
    """Write the rows `rows`, ascending, of an array; they reach the disk."""
    step = data[:1].nbytes
    edges = np.flatnonzero(np.diff(rows, prepend=-2, append=-2) != 1)  # runs of successive rows
    with place.opened(os.O_WRONLY) as descriptor:
        try:
            for first, last in pairwise(edges):
                write_at(descriptor, place.start + int(rows[first]) * step, data[first:last])
            os.fsync(descriptor)
        except OSError as error:
            raise _no_room(error, place.path, data.nbytes) from None


def parts(rows: int, most: int) -> Iterator[slice]:
    """Cut rows into slices of at most so many."""
    for start in range(0, rows, most):
        yield slice(start, min(start + most, rows))


def lock(descriptor: int) -> None:
    """Take a file's or folder's lock against other processes, until it is closed."""
    import fcntl  # only writing needs it: a store can be read where there is none

    fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; it ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)
