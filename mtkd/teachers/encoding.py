"""A teacher's embeddings as the numbers that are stored, and as tensors again."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .format import Teacher

Array = npt.NDArray[Any]
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "int8")}


def encode(teacher: Teacher, values: Any, rows: Array) -> dict[str, Array]:
    """Check embeddings ``(n, D_t)`` and return what goes into the teacher's files, by name.

    The largest magnitude of an int8 row is 127 steps of its scale.
    """
    tensor = check_values(teacher.name, values, (len(rows), teacher.dim))
    _check_finite(teacher, tensor, rows, "finite numbers", "NaN or infinity")
    if teacher.dtype == "int8":
        scales = tensor.abs().amax(1).float() / 127
        _check_finite(teacher, scales[:, None], rows, "numbers within float32", "larger ones")
        steps = tensor / torch.where(scales > 0, scales, 1.0)[:, None]
        stored = steps.round().clamp(-127, 127).to(torch.int8)
        return {"values.npy": stored.numpy(), "scales.npy": scales.numpy()}
    stored = tensor.to(DTYPES[teacher.dtype])
    largest = torch.finfo(stored.dtype).max
    wanted = (
        f"magnitudes that round to at most {largest:.6g}, since it is stored as {teacher.dtype}"
    )
    _check_finite(teacher, stored, rows, wanted, "larger ones")
    if stored.dtype == torch.bfloat16:
        stored = stored.view(torch.int16)
        return {"values.npy": stored.contiguous().numpy().view(np.uint16)}
    return {"values.npy": stored.contiguous().numpy()}


def as_tensor(teacher: Teacher, values: Array) -> Tensor:
    """View an array of the teacher's values.npy as a tensor of its dtype."""
    if teacher.dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def check_values(name: str, values: Any, shape: tuple[int, int]) -> Tensor:
    """Return embeddings as a tensor on the CPU, if they are floating point and of that shape."""
    if not isinstance(values, (Tensor, np.ndarray)):
        kind = type(values).__name__
        raise TypeError(f"{name}: expected values in a tensor or an array, got {kind}")
    if not (values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"):
        raise TypeError(f"{name}: expected floating-point values, got {values.dtype}")
    if tuple(values.shape) != shape:
        got = tuple(values.shape)
        raise ValueError(f"{name}: expected values of shape {shape}, got shape {got}")
    return values.detach().cpu() if isinstance(values, Tensor) else torch.tensor(values)


def _check_finite(teacher: Teacher, tensor: Tensor, rows: Array, expected: str, got: str) -> None:
    good = tensor.isfinite().all(1)
    if not good.all():
        bad = rows[~good.numpy()]
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise ValueError(f"{teacher.name}: expected {expected}, got {got} in rows {shown}")
