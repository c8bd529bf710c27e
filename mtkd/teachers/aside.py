"""Files and folders that are made aside and take their names once they are whole."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._durable import flush
from .files import locked

# What the name of a folder inside another begins with: not complete yet; complete and moving up.
_BEGUN, _WHOLE = ".making.", ".moving."
_HEX = "[0-9a-f]" * 32


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
    flush(path.parent)


@contextmanager
def making(path: str | os.PathLike[str], advice: str = "") -> Iterator[Path]:
    """Make a folder aside, then give it its name: it is there whole or not at all.

    A folder that is there and empty stays what it is, a mount for example, and is filled. Where
    something is in it, the error ends with an advice.
    """
    root = Path(path).resolve()
    if not root.exists():
        with _aside(root.with_name(f".{root.name}.{uuid.uuid4().hex}")) as aside:
            yield aside
            try:
                os.replace(aside, root)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise _taken(f"{root}, which was made in the meantime", advice) from None
        flush(root.parent)
        return
    if not root.is_dir():
        raise _taken(f"the file {root}", advice)
    with locked(root):
        _clear(root)
        if there := next(root.iterdir(), None):
            raise _taken(f"{root} with {there.name}", advice)
        with _aside(root / f"{_BEGUN}{uuid.uuid4().hex}") as aside:
            yield aside
            whole = aside.with_name(aside.name.replace(_BEGUN, _WHOLE))
            os.replace(aside, whole)
            try:
                _move_up(whole)
            except BaseException:
                os.replace(whole, aside)
                raise
        flush(root)


def _taken(got: str, advice: str) -> ValueError:
    return ValueError(f"path: expected a new or an empty folder, got {got}{advice}")


def _clear(root: Path) -> None:
    """Remove what killed processes have begun, and finish what they moved: we have the lock."""
    for left in _folders(root, _BEGUN + _HEX):
        shutil.rmtree(left)
    for left in _folders(root, _WHOLE + _HEX):
        _move_up(left)


def _folders(root: Path, pattern: str) -> list[Path]:
    """Folders of such a name; files and links of one are somebody else's, and stay."""
    return [path for path in root.glob(pattern) if path.is_dir() and not path.is_symlink()]


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
            if os.path.lexists(above := folder.parent / entry.name):
                raise ValueError(f"path: expected {entry} to take its name, got {above}")
            os.replace(entry, above)
            moved.append(above)
    except BaseException:
        for entry in moved:
            os.replace(entry, folder / entry.name)
        raise
    folder.rmdir()
