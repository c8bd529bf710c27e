"""Arguments of probes as arrays: one clear error that names what was expected and what came."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
_LARGEST = 1e140  # sums of squares of these stay far from what float64 cannot hold


def to_array(values: Any) -> Array:
    """Return a tensor (any device, any dtype) or anything array-like as an array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def to_columns(name: str, values: Any, rows: int | None = None, width: int | None = None) -> Array:
    """Return numbers ``(N, H)`` in float64, N and H at least 1 or as asked.

    They are finite, and so are sums of their squares.
    """
    array = to_array(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected numbers, got dtype {array.dtype}")
    expected = f"({'N' if rows is None else rows}, {'H' if width is None else width})"
    fits = array.ndim == 2 and array.size > 0
    fits = fits and rows in (None, len(array)) and width in (None, array.shape[-1])
    if not fits:
        raise ValueError(f"{name}: expected shape {expected}, got shape {array.shape}")
    array = array.astype(np.float64)
    bad = len(array) - int(np.isfinite(array).all(1).sum())
    if bad:
        raise ValueError(
            f"{name}: expected finite numbers, got NaN or infinity in {bad} of {len(array)} rows"
        )
    if (largest := np.abs(array).max()) > _LARGEST:
        raise ValueError(
            f"{name}: expected magnitudes up to {_LARGEST:g}, whose squares fit float64,"
            f" got {largest:g}"
        )
    return array


def to_values(name: str, values: Any, rows: int) -> Array:
    """Return finite numbers ``(N, K)``; a vector ``(N,)`` is one column."""
    array = to_array(values)
    return to_columns(name, array[:, None] if array.ndim == 1 else array, rows)


def to_labels(name: str, labels: Any, rows: int, least: int = 1) -> Array:
    """Return labels ``(N,)``, of any type that sorts, with at least so many different ones."""
    array = to_array(labels)
    if array.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), got shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name}: expected labels, got NaN or infinity")
    found = len(np.unique(array))
    if found < least:
        raise ValueError(f"{name}: expected at least {least} different labels, got {found}")
    return array


def check_count(name: str, value: Any, most: int, of: str) -> None:
    """Raise unless `value` is a whole number from 1 to `most`, which is what `of` says."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    if not 1 <= value <= most:
        raise ValueError(f"{name}: expected 1 to {most} ({of}), got {value}")


def check_rows(name: str, array: Array, least: int) -> None:
    """Raise ValueError unless there are at least so many rows."""
    if len(array) < least:
        raise ValueError(f"{name}: expected at least {least} rows, got {len(array)}")
