"""Fused kernels for distilling one student from many teachers.

Losses are in `mtkd.functional`, heads and normalisation in `mtkd.nn`; ``python -m mtkd`` says
which implementation each loss uses here.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

try:
    __version__ = version("mtkd")
except PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "unknown"

_ROOMS = (
    *("distributed", "evaluation", "functional", "information", "nn", "reduction", "reference"),
    *("teachers", "trainer", "weighting"),
)


def __getattr__(name: str) -> ModuleType:
    """Import a room when it is first named: `import mtkd` alone brings none."""
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
