"""Packed parameters with a teacher's own names in the state dict."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Piece(NamedTuple):
    """A teacher's part of a packed parameter."""

    name: str  # in the state dict
    parameter: str  # attribute of the module
    index: tuple[Any, ...]  # of the part in the parameter


class PackedModule(nn.Module):
    """A module whose state dict names parts of its parameters, as `pieces` lists them.

    Teachers are found by name, so their order may differ between what is saved and what loads.
    """

    def pieces(self) -> Iterator[Piece]:
        """Yield every part of every parameter, once."""
        raise NotImplementedError

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, parameter, index in self.pieces():
            part = self.get_parameter(parameter)[index]
            destination[prefix + name] = part if keep_vars else part.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = set()
        for name, parameter, index in self.pieces():
            key = prefix + name
            known.add(key)
            if key not in state_dict:
                missing_keys.append(key)
                continue
            message = self._load_piece(parameter, index, state_dict[key])
            if message:
                error_msgs.append(f"{key}: {message}")
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]

    @torch.no_grad()
    def _load_piece(self, parameter: str, index: tuple[Any, ...], value: Tensor) -> str | None:
        part = self.get_parameter(parameter)[index]
        if part.shape != value.shape:
            return f"expected shape {tuple(part.shape)}, got shape {tuple(value.shape)}"
        part.copy_(value)
        return None
