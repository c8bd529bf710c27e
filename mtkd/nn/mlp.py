"""Hidden layers of every teacher's head, the first of them one GEMM."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..functional.checks import check_shape, check_tensor
from ..packing import LARGEST, offsets, pack, split
from .packed import PackedModule, Piece
from .teachers import Teachers, Tensors

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
    parameters, ``<layer>_weight`` and ``<layer>_bias``. Teachers whose hidden widths agree are one
    group, whose layers are packed; else each is a group of its own.
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
        equal = len(set(self.hidden)) == 1
        self.groups = (
            [(len(self.hidden), self.hidden[0])] if equal else [(1, n) for n in self.hidden]
        )
        self.activation, self.norm, self.bias = activation, norm, bias
        self._make_hidden()

    def _make_hidden(self) -> None:
        """Hidden layer 0 is packed, and so are norms; the others are packed in a group."""
        width = sum(self.hidden)
        if self.depth:
            self.add("hidden_0", (width, self.in_features), (width,))
        for layer in range(1, self.depth):
            for group, (teachers, units) in enumerate(self.groups):
                rows = teachers * units
                self.add(f"hidden_{layer}_{group}", (rows, units), (rows,))
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
        if not self.depth:
            return
        columns = slice(*offsets(self.hidden)[teacher : teacher + 2])
        group, own = self.place(teacher, self.hidden)
        for layer in range(self.depth + 1):
            yield f"norm.{layer}", f"norm_{layer}", (columns,)
            yield f"hidden.{layer}", f"hidden_{layer}", (columns,)
            yield f"hidden.{layer}", f"hidden_{layer}_{group}", (own,)

    def place(self, teacher: int, widths: Sequence[int]) -> tuple[int, slice]:
        """Return the group of a teacher, and its rows in a layer of these widths there."""
        if len(self.groups) > 1:
            return teacher, slice(None)
        return 0, slice(*offsets(widths)[teacher : teacher + 2])

    def layer(self, name: str) -> tuple[Any, Any]:
        """Return weight and bias of a layer, None where it has none."""
        return getattr(self, f"{name}_weight", None), getattr(self, f"{name}_bias", None)

    def features(self, student: Tensor) -> list[Tensor]:
        """Return the inputs of the last layers: one shared, or one a teacher."""
        if not self.depth:
            return [self._checked(student)]
        leading, groups = student.shape[:-1], self.grouped(student)
        return [x.reshape(*leading, x.shape[1]) for group in groups for x in group.unbind(1)]

    def grouped(self, student: Tensor) -> list[Tensor]:
        """Return what the last hidden layer makes, ``(N, T, hidden)`` of each group."""
        student = self._checked(student)
        rows = student.reshape(student.shape[:-1].numel(), self.in_features)
        if not torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(self.get_parameter("hidden_0_weight").dtype)  # a 16-bit student's
        columns = ACTIVATIONS[self.activation](functional.linear(rows, *self.layer("hidden_0")))
        widths = [teachers * units for teachers, units in self.groups]
        return [
            self._through(x.unflatten(1, self.groups[group]), group)
            for group, x in enumerate(split(columns, widths))
        ]

    def _through(self, x: Tensor, group: int) -> Tensor:
        """Pass a group through the hidden layers after the first."""
        x = self._normalise(x, group, 1)
        for layer in range(1, self.depth):
            teachers, units = self.groups[group]
            columns = project(x, *self.layer(f"hidden_{layer}_{group}"), [units] * teachers)
            x = ACTIVATIONS[self.activation](columns).unflatten(1, (teachers, units))
            x = self._normalise(x, group, layer + 1)
        return x

    def _checked(self, student: Tensor) -> Tensor:
        self.check_whole()
        check_tensor("student", student)
        check_shape("student", student, (*student.shape[:-1], self.in_features))
        return functional.layer_norm(student, student.shape[-1:]) if self.norm else student

    def _normalise(self, x: Tensor, group: int, layer: int) -> Tensor:
        if not self.norm:
            return x
        widths = [teachers * units for teachers, units in self.groups]
        weight, bias = (
            split(p, widths)[group].view(x.shape[1:]) for p in self.layer(f"norm_{layer}")
        )
        return torch.addcmul(bias, functional.layer_norm(x, x.shape[-1:]), weight)

    def fused(
        self,
        loss: Callable[..., Tensor],
        layers: Sequence[Mapping[str, Any]],
        student: Tensor,
        target: Tensors,
        **options: Any,
    ) -> Tensor:
        """Call a ``linear_*`` loss with the last layers, one of all teachers or one a teacher."""
        features = self.features(student)
        targets = self.teachers.in_order("target", target)
        if not self.depth:
            packed = targets if isinstance(targets, Tensor) else pack(targets)[0]
            dims = self.teachers.dims
            return loss(features[0], target=packed, dims=dims, **layers[0], **options)
        if isinstance(targets, Tensor):
            targets = split(targets, self.teachers.dims)
        lists: dict[str, Any] = {key: [layer[key] for layer in layers] for key in layers[0]}
        return loss(features, target=targets, **lists, **options)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, widths: Sequence[int]) -> Tensor:
    """Multiply ``(N, T, H)`` by each teacher's rows of a packed weight ``(sum widths, H)``.

    Returns columns ``(N, sum widths)``. Small teachers of one width take a batched product.
    """
    rows, teachers, features = x.shape
    largest = max(rows * features, rows * widths[0], widths[0] * features)
    if teachers > 1 and len(set(widths)) == 1 and largest <= LARGEST:
        weight, x = weight.unflatten(0, (teachers, -1)).mT, x.transpose(0, 1)
        if bias is None:
            return torch.bmm(x, weight).transpose(0, 1).flatten(1)
        return torch.baddbmm(bias.view(teachers, 1, -1), x, weight).transpose(0, 1).flatten(1)
    biases = [None] * teachers if bias is None else split(bias, widths)
    triples = zip(x.unbind(1), weight.split(list(widths)), biases, strict=True)
    columns = [functional.linear(*triple) for triple in triples]
    return columns[0] if teachers == 1 else torch.cat(columns, 1)


def show_teachers(in_features: int, teachers: Teachers) -> str:
    """Describe input and teachers, for `extra_repr`."""
    named = dict(zip(teachers.names, teachers.dims, strict=True))
    return f"{in_features}, {named if teachers.named else teachers.dims}"


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
