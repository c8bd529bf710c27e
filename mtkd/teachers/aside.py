"""Files and folders that are made aside and take their names once they are whole."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import locked, sync_folder

_BEGUN = ".making."  # what the name of a folder that is not complete begins with, inside another


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file in one step: it holds the old content or the new, whatever happens."""
    with replacing(path) as aside, open(aside, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file to be made aside, which takes the name `path` when it is whole."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def making(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder aside, then give it its name: it is there whole or not at all.

    A folder that is there and empty stays what it is, a mount for example, and is filled.
    """
    root = Path(path).resolve()
    if not root.exists():
        with _aside(root.with_name(f".{root.name}.{uuid.uuid4().hex}")) as aside:
            yield aside
            os.replace(aside, root)
        sync_folder(root.parent)
        return
    if not root.is_dir():
        raise ValueError(f"path: expected a new or an empty folder, got {root}")
    with locked(root):
        for left in root.glob(f"{_BEGUN}*"):  # by a process that was killed: we have the lock
            shutil.rmtree(left)
        if any(root.iterdir()):
            raise ValueError(f"path: expected a new or an empty folder, got {root}")
        with _aside(root / f"{_BEGUN}{uuid.uuid4().hex}") as aside:
            yield aside
            _move_up(aside)
        sync_folder(root)


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)
        raise


def _move_up(folder: Path) -> None:
    """Move what a folder holds into the one above, files last, and remove it; or move nothing."""
    moved: list[Path] = []
    try:
        for entry in sorted(folder.iterdir(), key=Path.is_file):
            os.replace(entry, above := folder.parent / entry.name)
            moved.append(above)
    except BaseException:
        for entry in moved:
            os.replace(entry, folder / entry.name)
        raise
    folder.rmdir()
