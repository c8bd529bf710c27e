"""Memory maps that hold no descriptor: a store of hundreds of teachers has more files than those.

Python's own maps each keep a descriptor until 3.13, so that 1024, a usual limit, would do for some
three hundred teachers.
"""

import ctypes
import mmap
import os
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def map_file(path: Path, descriptor: int, size: int) -> Array:
    """Map the bytes of an open file read-only; what others write to it appears there.

    The map ends with the last array that shows it.
    """
    system = _system()
    address = system.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)}: expected room to map {size} bytes", str(path))
    memory = (ctypes.c_ubyte * size).from_address(address)
    # Not at the end of the process, when threads may still read: the system does it then.
    weakref.finalize(memory, system.munmap, address, size).atexit = False
    return np.frombuffer(memoryview(memory).toreadonly(), np.uint8)


@cache
def _system() -> Any:
    """The C library, told the types of its two functions."""
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype, number = ctypes.c_void_p, ctypes.c_int
    offset = ctypes.c_ssize_t  # off_t, where addresses have 64 bits
    system.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, number, number, number, offset]
    system.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return system
