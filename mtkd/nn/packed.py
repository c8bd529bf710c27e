"""Packed parameters whose parts have a teacher's own names in the state dict."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Piece(NamedTuple):
    """A teacher's part of a packed parameter."""

    name: str  # in the state dict
    parameter: str  # attribute of the module
    where: tuple[Any, ...]  # its index in the parameter


class PackedModule(nn.Module, ABC):
    """A module whose state dict holds parts of its parameters, as `pieces` lists them.

    Teachers are found by name, so their order may differ between what is saved and what loads.
    """

    expendable = True  # thrown away after training: `student_state_dict` leaves it out

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_split)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_join)  # type: ignore[no-untyped-call]

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Yield every part of every parameter, once."""


def _split(module: PackedModule, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    packed = {name: state_dict.pop(prefix + name) for name, _ in module.named_parameters()}
    for name, parameter, index in module.pieces():
        state_dict[prefix + name] = packed[parameter][index]


def _join(
    module: PackedModule,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for piece in module.pieces():
        pieces[piece.parameter].append(piece)
    for name, parts in pieces.items():
        parameter, found = module.get_parameter(name).detach(), []
        for key, _, index in parts:
            value, shape = state_dict.pop(prefix + key, None), parameter[index].shape
            if value is None:
                missing_keys.append(prefix + key)
            elif not isinstance(value, Tensor) or value.shape != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                error_msgs.append(f"{prefix}{key}: expected shape {tuple(shape)}, got {got}")
            else:
                found.append((index, value))
        joined = parameter.clone()  # what is missing keeps its value
        if len(found) == len(parts):  # dtype and device of what loads: assign=True wants them
            joined = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
        for index, value in found:
            joined[index] = value
        state_dict[prefix + name] = joined


def student_state_dict(module: nn.Module) -> dict[str, Any]:
    """Return the state dict of a model without its expendable parts: what a user of it needs.

    Modules whose attribute `expendable` is true are left out, wherever they are in the model: the
    heads and projectors of `mtkd.nn`, and any module of yours that sets it. What they share with
    another part of the model stays, under that part's name. Keys are otherwise those of
    ``module.state_dict()``, wrappers' prefixes such as ``module.`` included.

    Example:
        >>> from torch import nn
        >>> from mtkd.nn import Projectors, student_state_dict
        >>> model = nn.ModuleDict({"student": nn.Linear(8, 4), "heads": Projectors(4, (3, 5))})
        >>> list(student_state_dict(model))
        ['student.weight', 'student.bias']
    """
    expendable = [x for x in module.modules() if getattr(x, "expendable", False)]
    hooks = [x.register_state_dict_post_hook(_drop) for x in expendable]  # they know the prefix
    try:
        state: dict[str, Any] = module.state_dict()
    finally:
        for hook in hooks:
            hook.remove()
    return state


def _drop(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]
