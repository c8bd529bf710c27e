"""Checks that losses share: one clear error that names the argument, what it wants, what came."""

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

Dims = Sequence[int] | Mapping[str, int]  # widths of teachers, in order, maybe by name

_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def is_sequence(argument: Any) -> bool:
    """Whether an argument holds one tensor a teacher."""
    return isinstance(argument, (list, tuple))


def check_tensor(name: str, tensor: Any, device: torch.device | None = None) -> None:
    """Raise TypeError unless `tensor` is a floating-point tensor that kernels can read."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "device_mesh"):
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor; pass its to_local()")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """Raise ValueError unless `tensor` has the expected shape."""
    if tensor.shape != expected:
        raise ValueError(
            f"{name}: expected shape {tuple(expected)}, got shape {tuple(tensor.shape)}"
        )


def check_target(name: str, target: Any, device: torch.device) -> None:
    """Raise unless `target` is a teacher's tensor: floating point, no gradient asked for."""
    check_tensor(name, target, device)
    if target.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that does not require grad, since teachers receive no"
            f" gradient; got requires_grad=True; pass {name}.detach()"
        )


def check_dims(dims: Dims | None, width: int | None, name: str) -> tuple[int, ...]:
    """Return the teachers' widths, positive; they sum to the columns of `name`, if it has any."""
    if dims is None and width:
        return (width,)
    dims = (width or 0,) if dims is None else dims
    if isinstance(dims, Mapping):  # by name, as a store has them
        dims = tuple(dims.values())
    if not is_sequence(dims):
        raise TypeError(f"dims: expected a sequence of widths, got {type(dims).__name__}")
    widths = tuple(dims)
    if set(map(type, widths)) - {int}:
        try:
            widths = tuple(map(index, widths))
        except TypeError:
            raise TypeError(f"dims: expected integers, got {_short(dims)}") from None
    if not widths or min(widths) < 1:
        raise ValueError(f"dims: expected a positive width for each teacher, got {_short(dims)}")
    if width is not None and sum(widths) != width:
        raise ValueError(
            f"dims: expected widths that sum to the {width} columns of {name},"
            f" got {_short(dims)}, which sum to {sum(widths)}"
        )
    return widths


class Group(NamedTuple):
    """The tensors of one call of an operator: packed teachers, or one teacher of a sequence."""

    tensors: tuple[Any, ...]
    dims: Dims | None
    suffix: str  # "[t]" for teacher t of a sequence, for error messages


def group_teachers(dims: Dims | None, **arguments: Any) -> list[Group]:
    """Group arguments into calls: one for packed tensors, one a teacher for sequences.

    The first argument decides; with sequences every other argument is one, or None.
    """
    (first_name, first), *others = arguments.items()
    if not is_sequence(first):
        for name, argument in others:
            if is_sequence(argument):
                raise TypeError(
                    f"{name}: expected a tensor like {first_name}, got {type(argument).__name__}"
                )
        return [Group(tuple(arguments.values()), dims, "")]
    teachers = len(first)
    if not teachers:
        raise ValueError(f"{first_name}: expected one tensor a teacher, got none")
    if dims is not None:
        raise ValueError(f"dims: expected None with one tensor a teacher, got {_short(dims)}")
    columns: list[Sequence[Any]] = [first]
    for name, argument in others:
        if argument is not None and not is_sequence(argument):
            kind = type(argument).__name__
            raise TypeError(f"{name}: expected {teachers} tensors like {first_name}, got {kind}")
        if argument is not None and len(argument) != teachers:
            raise ValueError(
                f"{name}: expected {teachers} tensors like {first_name}, got {len(argument)}"
            )
        columns.append([None] * teachers if argument is None else argument)
    rows = enumerate(zip(*columns, strict=True))
    return [Group(tensors, None, f"[{teacher}]") for teacher, tensors in rows]


def check_teacher_logits(teacher: Any, student: Tensor, least: int = 1) -> tuple[list[Tensor], int]:
    """Check the teachers' logits beside a student's ``(*, C)``; return them and their number.

    They are one tensor ``(*, T, C)``, or a sequence of T tensors ``(*, C)``; C is at least `least`.
    """
    if student.dim() < 1 or student.shape[-1] < least:
        shape = tuple(student.shape)
        raise ValueError(f"student: expected shape (*, C), C at least {least}, got shape {shape}")
    if is_sequence(teacher):
        if not teacher:
            raise ValueError("teacher: expected one tensor a teacher, got none")
        for t, each in enumerate(teacher):
            check_target(f"teacher[{t}]", each, student.device)
            check_shape(f"teacher[{t}]", each, student.shape)
        return list(teacher), len(teacher)
    check_target("teacher", teacher, student.device)
    count = teacher.shape[-2] if teacher.dim() > 1 else 0
    *leading, classes = student.shape
    if not count or teacher.shape != (*leading, count, classes):
        expected = ", ".join(map(str, (*leading, "T", classes)))
        raise ValueError(
            f"teacher: expected shape (*, T, C), ({expected}) beside the student's"
            f" {tuple(student.shape)}, T at least 1, got shape {tuple(teacher.shape)}"
        )
    return [teacher], count


def check_bound(bound: float | None) -> None:
    """Raise ValueError unless `bound` is None or a positive finite number, in float32 too."""
    if bound is not None and not (isinstance(bound, (int, float)) and _LEAST <= bound <= _MOST):
        raise ValueError(f"bound: expected None or a positive finite number, got {bound!r}")


def check_number(name: str, value: Any, positive: bool = False) -> None:
    """Raise unless a setting is a finite number that is not negative, or that is positive."""
    expected = "a positive finite number" if positive else "a finite number, 0 or more"
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not ((value > 0 if positive else value >= 0) and value <= _MOST):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _short(dims: Any) -> str:
    text = str(tuple(dims)) if is_sequence(dims) else repr(dims)
    return text if len(text) <= 80 else text[:77] + "..."
