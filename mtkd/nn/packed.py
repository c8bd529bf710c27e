"""Packed parameters whose parts have a teacher's own names in the state dict."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
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

    def check_whole(self) -> None:
        """Raise TypeError where a kernel would meet a parameter that FSDP has sharded."""
        first = next(iter(self._parameters.values()))  # FSDP shards all of a module's, or none
        if hasattr(first, "device_mesh"):
            raise TypeError(
                f"{type(self).__name__}: expected whole parameters, got DTensors, which FSDP"
                " gathers around forward alone; for another method there is"
                " torch.distributed.fsdp.register_fsdp_forward_method"
            )

    def pieces_of(self) -> dict[str, list[Piece]]:
        """Return the parts of each parameter."""
        found: dict[str, list[Piece]] = defaultdict(list)
        for piece in self.pieces():
            found[piece.parameter].append(piece)
        return found

    @property
    def paths(self) -> "_Path":
        """The keys of the state dict as paths of attributes."""
        return _Path([piece.name for piece in self.pieces()])

    def _fqn_modifiers(self) -> dict[str, str]:
        """Tell torch.distributed.checkpoint, which follows keys by attributes, where to look."""
        return {"teachers": "paths"}


class _Path:
    """What keys have in common up to a dot: attributes are their next parts."""

    def __init__(self, keys: list[str]) -> None:
        self._keys = keys

    def __getattr__(self, name: str) -> "_Path":
        rest = [key[len(name) + 1 :] for key in self._keys if f"{key}.".startswith(f"{name}.")]
        if not rest:
            raise AttributeError(f"no key of the state dict has {name!r} here")
        return _Path(rest)


def _split(module: PackedModule, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for parameter, pieces in module.pieces_of().items():
        packed = state_dict.pop(prefix + parameter)
        whole = _whole(packed)  # gathered once
        for piece in pieces:
            state_dict[prefix + piece.name] = _placed_as(packed, whole[piece.where])
    for piece in module.pieces():  # a teacher's keys together
        state_dict[prefix + piece.name] = state_dict.pop(prefix + piece.name)


def _whole(tensor: Any) -> Tensor:
    """Return a tensor, gathered from all ranks if it is a DTensor, as FSDP's parameters are."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _placed_as(like: Any, tensor: Tensor) -> Tensor:
    """Return a tensor that all ranks have, sharded as `like` is: nothing is sent.

    Parts of a parameter are sharded by their first dimension, whichever the parameter's is.
    """
    if not hasattr(like, "device_mesh"):
        return tensor
    tensors = import_module("torch.distributed.tensor")
    places = like.placements
    if tensor.shape != like.shape:
        places = [tensors.Shard(0) if place.is_shard() else place for place in places]
    mesh = like.device_mesh
    placed: Tensor = tensors.distribute_tensor(tensor, mesh, places, src_data_rank=None)
    return placed


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
    for name, parts in module.pieces_of().items():
        parameter, found = module.get_parameter(name).detach(), []
        shapes = torch.empty(parameter.shape, device="meta")
        for key, _, index in parts:
            value, shape = state_dict.pop(prefix + key, None), shapes[index].shape
            if value is None:
                missing_keys.append(prefix + key)
            elif not isinstance(value, Tensor) or value.shape != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                error_msgs.append(f"{prefix}{key}: expected shape {tuple(shape)}, got {got}")
            else:
                found.append((index, _whole(value)))
        joined = _whole(parameter).clone()  # what is missing keeps its value
        if len(found) == len(parts):  # dtype and device of what loads: assign=True wants them
            last = found[-1][1]
            joined = torch.empty(parameter.shape, dtype=last.dtype, device=last.device)
        for index, value in found:
            joined[index] = value
        state_dict[prefix + name] = _placed_as(parameter, joined)


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
