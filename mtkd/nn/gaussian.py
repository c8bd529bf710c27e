"""Gaussian heads: an MLP a teacher whose last layer is the fused likelihood."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
)
from torch.nn import functional

from ..functional import linear_gaussian_nll
from ..functional.checks import check_bound, check_dims, check_shape, check_tensor
from ..packing import offsets
from .packed import PackedModule, Piece

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
KINDS = ("weight", "bias")
Targets = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class GaussianHeads(PackedModule):
    r"""Heads that predict every teacher's embedding as a Gaussian, or a mixture, and the loss.

    Each teacher has an MLP of the student's embedding; its last linear layer is fused with
    `mtkd.functional.linear_gaussian_nll`, so means, deviations and their gradients are never held
    whole. Train the heads with the student, then throw them away.

    Args:
        in_features: width H of the student's embedding.
        dims: the width of each teacher, or a mapping name -> width.
        hidden_features: width of the hidden layers; a float is a ratio of the teacher's width.
        depth: number of hidden layers.
        modes: number M of mixture modes.
        activation: "relu", "gelu", "silu" or "tanh".
        norm: LayerNorm before each linear layer. Before the first, which all teachers share, it
            has no scale and shift of its own: the layer's weights hold them.
        bound: bound b of the log standard deviations, ``b tanh(. / b)``; None for no bound.
        bias: whether linear layers have biases.
        per_dim: divide each teacher's loss by its width.

    Shape:
        - student ``(*, H)``; target ``(*, D)``, or ``(*, D_t)`` a teacher in a sequence or a
          mapping by name; mask ``(*, T)``; weight ``(T,)`` or ``(*, T)``.
        - Returns ``(*, T)`` for reduction "none", else a 0-dim tensor.

    Raises:
        ValueError: settings or shapes that do not fit.

    Note:
        Targets are not standardised inside: `TeacherNorm` does it. Log standard deviations start
        at 0. Parameters of the first layers are packed (one GEMM for all teachers); the state
        dict has them by teacher, ``teachers.<name>.mean.weight`` and so on.

    Source:
        Formont et al., arXiv 2510.18680: heads of 1 to 3 hidden layers, ``bound=1``.

    Example:
        >>> import torch
        >>> heads = GaussianHeads(16, {"cnn": 3, "pca": 5}, hidden_features=1.4, depth=1)
        >>> loss = heads(torch.randn(4, 16), torch.randn(4, 8))
        >>> loss.shape
        torch.Size([])
        >>> [tuple(d.sample().shape) for d in heads.distributions(torch.randn(4, 16)).values()]
        [(4, 3), (4, 5)]
    """

    def __init__(
        self,
        in_features: int,
        dims: Sequence[int] | Mapping[str, int],
        *,
        hidden_features: int | float | None = None,
        depth: int = 0,
        modes: int = 1,
        activation: str = "relu",
        norm: bool = False,
        bound: float | None = 1.0,
        bias: bool = True,
        per_dim: bool = True,
    ) -> None:
        super().__init__()
        self.named = isinstance(dims, Mapping)
        self.names = tuple(dims) if isinstance(dims, Mapping) else _numbers(len(dims))
        self.dims = tuple(dims.values() if isinstance(dims, Mapping) else dims)
        self.in_features, self.depth, self.modes = in_features, depth, modes
        self.activation, self.norm, self.bound = activation, norm, bound
        self.per_dim, self.bias = per_dim, bias
        _check_settings(self.names, self.dims, depth, hidden_features, modes, activation)
        check_bound(bound)
        self.hidden = _widths(hidden_features, self.dims) if depth else ()
        self._make_hidden()
        self._make_last()
        self.reset_parameters()

    def _make_hidden(self) -> None:
        if not self.depth:
            return
        width = sum(self.hidden)
        self._add("hidden_0", (width, self.in_features), (width,))
        for layer in range(1, self.depth):
            for teacher, units in enumerate(self.hidden):
                self._add(f"hidden_{layer}_{teacher}", (units, units), (units,))
        for layer in range(1, self.depth + 1 if self.norm else 0):  # before that layer
            self.register_parameter(f"norm_{layer}_weight", nn.Parameter(torch.empty(width)))
            self.register_parameter(f"norm_{layer}_bias", nn.Parameter(torch.empty(width)))

    def _make_last(self) -> None:
        """One packed layer on the student's embedding, or one a teacher on its hidden features."""
        self.groups = [(sum(self.dims), self.in_features, len(self.dims))]
        if self.depth:
            pairs = zip(self.dims, self.hidden, strict=True)
            self.groups = [(dim, units, 1) for dim, units in pairs]
        inner = (self.modes,) if self.modes > 1 else ()
        for group, (width, features, teachers) in enumerate(self.groups):
            self._add(f"last_{group}", (2, *inner, width, features), (2, *inner, width))
            if self.modes > 1:
                modes = (self.modes, teachers)
                self._add(f"modes_{group}", (*modes, features), modes)

    def _add(self, name: str, weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
        self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(weight)))
        if self.bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(bias)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as torch.nn.Linear does; log standard deviations are 0 at first."""
        for name, parameter in self.named_parameters():
            layer, kind = name.rsplit("_", 1)
            if layer.startswith("norm"):
                parameter.fill_(1.0 if kind == "weight" else 0.0)
                continue
            limit = 1.0 / math.sqrt(self.get_parameter(f"{layer}_weight").shape[-1])
            parameter.uniform_(-limit, limit)
            if layer.startswith("last"):
                parameter[1].zero_()

    def pieces(self) -> Iterator[Piece]:
        """Yield each teacher's parts of the parameters."""
        starts, hidden_starts = offsets(self.dims), offsets(self.hidden)
        for teacher, name in enumerate(self.names):
            prefix = f"teachers.{name}"
            if self.depth:
                units = slice(hidden_starts[teacher], hidden_starts[teacher + 1])
                yield from self._layer(f"{prefix}.hidden.0", "hidden_0", (units,))
                for layer in range(1, self.depth):
                    yield from self._layer(f"{prefix}.hidden.{layer}", f"hidden_{layer}_{teacher}")
                for layer in range(1, self.depth + 1):
                    yield from self._layer(f"{prefix}.norm.{layer}", f"norm_{layer}", (units,))
            columns = slice(starts[teacher], starts[teacher + 1])
            group, columns, at = (teacher, slice(None), 0) if self.depth else (0, columns, teacher)
            inner = (slice(None),) if self.modes > 1 else ()
            for part, kind in enumerate(("mean", "log_std")):
                yield from self._layer(f"{prefix}.{kind}", f"last_{group}", (part, *inner, columns))
            yield from self._layer(f"{prefix}.modes", f"modes_{group}", (slice(None), at))

    def _layer(self, name: str, layer: str, index: tuple[Any, ...] = ()) -> Iterator[Piece]:
        for kind in ("weight", "bias"):
            if hasattr(self, f"{layer}_{kind}"):
                yield Piece(f"{name}.{kind}", f"{layer}_{kind}", index)

    def forward(
        self,
        student: Tensor,
        target: Targets,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the loss of the teachers' embeddings given the student's."""
        targets = self._targets(target)
        layers = [self._last(group) for group in range(len(self.groups))]
        features = self._features(student)
        options: dict[str, Any] = {"mask": mask, "weight": weight, "denominator": denominator}
        options |= {"bound": self.bound, "per_dim": self.per_dim, "reduction": reduction}
        if not self.depth:
            w, bias, modes, mode_bias = layers[0]
            packed = targets if isinstance(targets, Tensor) else torch.cat(tuple(targets), -1)
            return linear_gaussian_nll(
                features[0],
                w,
                packed,
                self.dims,
                linear_bias=bias,
                mode_weight=modes,
                mode_bias=mode_bias,
                **options,
            )
        if isinstance(targets, Tensor):
            check_shape("target", targets, (*targets.shape[:-1], sum(self.dims)))
            targets = targets.split(list(self.dims), -1)
        weights, biases, modes_, mode_biases = (_all_or_none(x) for x in zip(*layers, strict=True))
        return linear_gaussian_nll(
            features,
            weights,
            targets,
            linear_bias=biases,
            mode_weight=modes_,
            mode_bias=mode_biases,
            **options,
        )

    def _targets(self, target: Targets) -> Tensor | Sequence[Tensor]:
        if not isinstance(target, Mapping):
            return target
        if set(target) != set(self.names):
            raise ValueError(
                f"target: expected the teachers {', '.join(self.names)}, got {', '.join(target)}"
            )
        return [target[name] for name in self.names]

    def _last(self, group: int) -> tuple[Tensor | None, ...]:
        names = (f"{layer}_{group}_{kind}" for layer in ("last", "modes") for kind in KINDS)
        return tuple(getattr(self, name, None) for name in names)

    def _features(self, student: Tensor) -> list[Tensor]:
        """Return the inputs of the last layers: one shared, or one a teacher."""
        check_tensor("student", student)
        check_shape("student", student, (*student.shape[:-1], self.in_features))
        if self.norm:
            student = functional.layer_norm(student, student.shape[-1:])
        if not self.depth:
            return [student]
        activate = ACTIVATIONS[self.activation]
        packed = activate(self._linear(student, "hidden_0"))
        features = self._normalised(packed.split(list(self.hidden), -1), 1)
        for layer in range(1, self.depth):
            features = [
                activate(self._linear(x, f"hidden_{layer}_{teacher}"))
                for teacher, x in enumerate(features)
            ]
            features = self._normalised(features, layer + 1)
        return features

    def _linear(self, x: Tensor, layer: str) -> Tensor:
        bias = getattr(self, f"{layer}_bias", None)
        return functional.linear(x, self.get_parameter(f"{layer}_weight"), bias)

    def _normalised(self, features: Sequence[Tensor], layer: int) -> list[Tensor]:
        if not self.norm:
            return list(features)
        weights = self.get_parameter(f"norm_{layer}_weight").split(list(self.hidden))
        biases = self.get_parameter(f"norm_{layer}_bias").split(list(self.hidden))
        return [
            functional.layer_norm(x, x.shape[-1:], weight, bias)
            for x, weight, bias in zip(features, weights, biases, strict=True)
        ]

    def distributions(
        self, student: Tensor
    ) -> list[Distribution] | dict[str, Distribution]:
        """Return each teacher's predicted distribution: a list, or a dict if teachers have names.

        ``-distribution.log_prob(target)`` is the loss with ``full=True, per_dim=False``.
        """
        features = self._features(student)
        made = []
        for group, (x, (weight, bias, modes, mode_bias)) in enumerate(
            zip(features, map(self._last, range(len(self.groups))), strict=True)
        ):
            dims = (self.dims[group],) if self.depth else self.dims
            parts = _project(x, weight, bias)
            logits = None if modes is None else _project(x, modes, mode_bias)
            for teacher, columns in enumerate(parts.split(list(dims), -1)):
                own = None if logits is None else logits[..., teacher]
                made.append(self._distribution(columns, own))
        return dict(zip(self.names, made, strict=True)) if self.named else made

    def _distribution(self, columns: Tensor, logits: Tensor | None) -> Distribution:
        mean, log_std = columns.unbind(-2 if logits is None else -3)
        if self.bound is not None:
            log_std = self.bound * torch.tanh(log_std / self.bound)
        normal = Independent(Normal(mean, log_std.exp()), 1)
        if logits is None:
            return normal
        categorical = Categorical(logits=logits)
        return MixtureSameFamily(categorical, normal)

    def extra_repr(self) -> str:
        """Describe the heads."""
        shown = f"in_features={self.in_features}, teachers={len(self.dims)}, depth={self.depth}"
        return f"{shown}, modes={self.modes}, bound={self.bound}, norm={self.norm}"


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(teacher) for teacher in range(count))


def _project(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    flat = functional.linear(x, weight.flatten(0, -2), None if bias is None else bias.flatten())
    return flat.unflatten(-1, weight.shape[:-1])


def _all_or_none(layers: Sequence[Tensor | None]) -> list[Tensor] | None:
    present = [layer for layer in layers if layer is not None]
    return present or None


def _widths(hidden_features: int | float | None, dims: Sequence[int]) -> tuple[int, ...]:
    if isinstance(hidden_features, float):
        return tuple(max(1, int(hidden_features * dim)) for dim in dims)
    return tuple(int(hidden_features or 0) for _ in dims)


def _check_settings(
    names: Sequence[str],
    dims: Sequence[int],
    depth: int,
    hidden_features: int | float | None,
    modes: int,
    activation: str,
) -> None:
    check_dims(dims, sum(dims), "dims")
    if any("." in name or not name for name in names):
        raise ValueError(f"dims: expected names without dots, got {', '.join(names)}")
    if depth < 0:
        raise ValueError(f"depth: expected a number of hidden layers, at least 0, got {depth}")
    if depth and (hidden_features is None or hidden_features <= 0):
        raise ValueError(
            f"hidden_features: expected a positive int or ratio with depth={depth},"
            f" got {hidden_features}"
        )
    if modes < 1:
        raise ValueError(f"modes: expected at least 1, got {modes}")
    if activation not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: expected one of {expected}, got {activation!r}")
