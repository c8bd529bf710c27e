"""Hidden layers of every teacher's head, the first of them packed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..functional.checks import check_shape, check_tensor
from ..packing import offsets, split
from .packed import PackedModule, Piece
from .teachers import Teachers

Parts = Iterator[tuple[str, str, tuple[Any, ...]]]
KINDS = ("weight", "bias")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class TeacherMLPs(PackedModule):
    """Base of heads: an MLP a teacher on the student's embedding, less its last layer.

    Heads `add` their last layers, list them in `parts` and call `features`. A layer is a pair of
    parameters, ``<layer>_weight`` and ``<layer>_bias``.
    """

    def __init__(
        self,
        in_features: int,
        dims: Sequence[int] | Mapping[str, int],
        hidden_features: int | float | None,
        depth: int,
        activation: str,
        norm: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        check_count("in_features", in_features, 1)
        check_count("depth", depth, 0)
        if activation not in ACTIVATIONS:
            expected = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation: expected one of {expected}, got {activation!r}")
        self.teachers, self.in_features, self.depth = Teachers.of(dims), in_features, depth
        self.hidden = _widths(hidden_features, depth, self.teachers.dims)
        self.activation, self.norm, self.bias = activation, norm, bias
        self._make_hidden()

    def _make_hidden(self) -> None:
        """Hidden layer 0 is packed, and so are norms; the others are a teacher's own."""
        width = sum(self.hidden)
        if self.depth:
            self.add("hidden_0", (width, self.in_features), (width,))
        for layer in range(1, self.depth):
            for teacher, units in enumerate(self.hidden):
                self.add(f"hidden_{layer}_{teacher}", (units, units), (units,))
        for layer in range(1, self.depth + 1 if self.norm else 0):  # named as the layer after it
            for kind in KINDS:
                self.register_parameter(f"norm_{layer}_{kind}", nn.Parameter(torch.empty(width)))

    def add(self, layer: str, weight: Sequence[int], bias: Sequence[int]) -> None:
        """Add a layer's parameters, of the given shapes."""
        self.register_parameter(f"{layer}_weight", nn.Parameter(torch.empty(weight)))
        if self.bias:
            self.register_parameter(f"{layer}_bias", nn.Parameter(torch.empty(bias)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as torch.nn.Linear and LayerNorm do."""
        for name, parameter in self.named_parameters():
            layer, kind = name.rsplit("_", 1)
            if layer.startswith("norm"):
                parameter.fill_(1.0 if kind == "weight" else 0.0)
                continue
            limit = 1.0 / math.sqrt(self.layer(layer)[0].shape[-1])
            parameter.uniform_(-limit, limit)

    def pieces(self) -> Iterator[Piece]:
        """Yield each teacher's parts of the parameters."""
        for teacher, name in enumerate(self.teachers.names):
            for part, layer, index in self.parts(teacher):
                for kind, parameter in zip(KINDS, self.layer(layer), strict=True):
                    if parameter is not None:
                        yield Piece(f"teachers.{name}.{part}.{kind}", f"{layer}_{kind}", index)

    def parts(self, teacher: int) -> Parts:
        """Yield the names of a teacher's layers, and where they are: which layer, which index."""
        start, end = offsets(self.hidden)[teacher : teacher + 2] if self.depth else (0, 0)
        for layer in range(self.depth + 1):
            yield f"norm.{layer}", f"norm_{layer}", (slice(start, end),)
            yield f"hidden.{layer}", f"hidden_{layer}", (slice(start, end),)
            yield f"hidden.{layer}", f"hidden_{layer}_{teacher}", ()

    def layer(self, name: str) -> tuple[Any, Any]:
        """Return weight and bias of a layer, None where it has none."""
        return getattr(self, f"{name}_weight", None), getattr(self, f"{name}_bias", None)

    def features(self, student: Tensor) -> list[Tensor]:
        """Return the inputs of the last layers: one shared, or one a teacher."""
        check_tensor("student", student)
        check_shape("student", student, (*student.shape[:-1], self.in_features))
        if self.norm:
            student = functional.layer_norm(student, student.shape[-1:])
        if not self.depth:
            return [student]
        activate = ACTIVATIONS[self.activation]
        packed = activate(functional.linear(student, *self.layer("hidden_0")))
        features = self._normalise(list(split(packed, self.hidden)), 1)
        for layer in range(1, self.depth):
            features = [
                activate(functional.linear(x, *self.layer(f"hidden_{layer}_{teacher}")))
                for teacher, x in enumerate(features)
            ]
            features = self._normalise(features, layer + 1)
        return features

    def _normalise(self, features: list[Tensor], layer: int) -> list[Tensor]:
        if not self.norm:
            return features
        weight, bias = (x.split(self.hidden) for x in self.layer(f"norm_{layer}"))
        triples = zip(features, weight, bias, strict=True)
        return [functional.layer_norm(x, x.shape[-1:], w, b) for x, w, b in triples]


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _widths(
    hidden_features: int | float | None, depth: int, dims: Sequence[int]
) -> tuple[int, ...]:
    if not depth:
        if hidden_features is not None:
            expected = "None with depth=0, no hidden layer"
            raise ValueError(f"hidden_features: expected {expected}, got {hidden_features!r}")
        return ()
    if not isinstance(hidden_features, (int, float)) or not 0 < hidden_features < math.inf:
        expected = f"a positive width or ratio with depth={depth}"
        raise ValueError(f"hidden_features: expected {expected}, got {hidden_features!r}")
    if isinstance(hidden_features, float):
        return tuple(max(1, int(hidden_features * dim)) for dim in dims)
    return (hidden_features,) * len(dims)
