"""Fused kernels for distilling one student from many teachers.

Losses are in `mtkd.functional`, heads and normalisation in `mtkd.nn`; ``python -m mtkd`` says
which implementation each loss uses here.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mtkd")
except PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "unknown"
