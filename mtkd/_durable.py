"""What was written reaches the disk, for every room that keeps files."""

import os


def flush(path: str | os.PathLike[str]) -> None:
    """Have the disk hold a file's content, or the names in a folder, before anything goes on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
