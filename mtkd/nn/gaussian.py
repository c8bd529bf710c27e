"""Gaussian heads: an MLP a teacher whose last layer is fused with the likelihood."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal
from torch.nn import functional

from ..functional import linear_gaussian_nll
from ..functional.checks import check_bound
from ..packing import offsets, split
from ..reduction import Weight
from ..reference.columns import accumulate_dtype
from .mlp import Parts, TeacherMLPs, check_count, show_teachers
from .teachers import Tensors


class GaussianHeads(TeacherMLPs):
    r"""Predict every teacher's embedding as a Gaussian, or a mixture; return the loss of that.

    Each teacher has an MLP of the student's embedding, whose last linear layer is fused with
    `mtkd.functional.linear_gaussian_nll`: means, deviations and their gradients are never held
    whole. Train the heads together with the student, then throw them away.

    Args:
        in_features: width H of the student's embedding.
        dims: the width of each teacher, or a mapping name -> width.
        hidden_features: width of hidden layers, or a float r for ``int(r * D_t)``.
        depth: number of hidden layers.
        modes: number M of mixture modes; their probabilities depend on the student too.
        activation: "relu", "gelu", "silu" or "tanh".
        norm: normalise (LayerNorm) before each linear layer.
        bound: with b, ``b * tanh(. / b)`` bounds the log standard deviations; None: no bound.
        bias: whether the linear layers have biases.
        per_dim: divide each teacher's loss by its width.

    Shape:
        - student ``(*, H)``; target ``(*, D)`` with ``D = sum(dims)``, or ``(*, D_t)`` a teacher
          in a sequence or, when `dims` is a mapping, a mapping by name.
        - mask ``(*, T)``; weight ``(T,)`` or ``(*, T)``, or a callable that makes them of the
          detached matrix ``(*, T)`` and the mask.

    Returns:
        ``(*, T)`` for reduction "none", else a 0-dim tensor: nats per dimension (nats without
        `per_dim`).

    Raises:
        ValueError: settings, widths, shapes or devices that do not fit.
        TypeError: not a floating-point tensor.

    Note:
        Targets are not standardised inside: `TeacherNorm` does that. The layers on the student
        itself are one packed GEMM for all teachers; the norm before them is shared and has no
        scale and shift of its own, which the weights and biases after it can hold. Layers start
        as torch.nn.Linear's do, log standard deviations at 0. The state dict has an entry for
        each teacher, ``teachers.<name>.mean.weight`` and so on, and loads by these names; they
        are views, which safetensors wants contiguous for mixtures.

    Source:
        Formont et al., "Learning Task-Agnostic Representations through Multi-Teacher
        Distillation", NeurIPS 2025, arXiv 2510.18680. Text: 1 to 3 hidden layers of ratio 1.4,
        ``bound=1``; molecules and vision: 2 of width 512, ``norm=True``, ``bound=None``.

    Example:
        >>> import torch
        >>> from mtkd.nn import GaussianHeads
        >>> heads = GaussianHeads(16, {"cnn": 3, "pca": 5}, hidden_features=1.4, depth=1)
        >>> student = torch.randn(4, 16, requires_grad=True)
        >>> heads(student, {"cnn": torch.randn(4, 3), "pca": torch.randn(4, 5)}).backward()
        >>> heads.distributions(student)["pca"].mean.shape
        torch.Size([4, 5])
        >>> heads.state_dict()["teachers.pca.mean.weight"].shape
        torch.Size([5, 7])
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
        super().__init__(in_features, dims, hidden_features, depth, activation, norm, bias)
        check_count("modes", modes, 1)
        check_bound(bound)
        self.modes, self.bound, self.per_dim = modes, bound, per_dim
        self._make_last()
        self.reset_parameters()

    def _make_last(self) -> None:
        """The last layer is packed if it is the first as well, else a teacher's own."""
        dims, inner = self.teachers.dims, (self.modes,) if self.modes > 1 else ()
        groups = [(dim, 1, units) for dim, units in zip(dims, self.hidden, strict=False)]
        for group, (width, teachers, features) in enumerate(
            groups or [(sum(dims), len(dims), self.in_features)]
        ):
            self.add(f"last_{group}", (2, *inner, width, features), (2, *inner, width))
            if inner:
                modes = (self.modes, teachers)
                self.add(f"modes_{group}", (*modes, features), modes)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as torch.nn.Linear does; log standard deviations are 0 at first."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("last"):
                parameter[1].zero_()

    def parts(self, teacher: int) -> Parts:
        """Yield the names of a teacher's layers, and where they are."""
        yield from super().parts(teacher)
        group, at, own = teacher, 0, slice(None)
        if not self.depth:
            group, at, own = 0, teacher, slice(*offsets(self.teachers.dims)[teacher : teacher + 2])
        inner = (slice(None),) if self.modes > 1 else ()
        yield "mean", f"last_{group}", (0, *inner, own)
        yield "log_std", f"last_{group}", (1, *inner, own)
        yield "modes", f"modes_{group}", (slice(None), at)

    def forward(
        self,
        student: Tensor,
        target: Tensors,
        *,
        mask: Tensor | None = None,
        weight: Weight = None,
        denominator: float | Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the loss of the teachers' embeddings given the student's."""
        count = len(self.teachers.dims) if self.depth else 1
        layers = [self._last(group) for group in range(count)]
        options: dict[str, Any] = {"mask": mask, "weight": weight, "denominator": denominator}
        options |= {"bound": self.bound, "per_dim": self.per_dim, "reduction": reduction}
        return self.fused(linear_gaussian_nll, layers, student, target, **options)

    def _last(self, group: int) -> dict[str, Tensor]:
        """Return the last layer as keyword arguments of `linear_gaussian_nll`."""
        weight, bias = self.layer(f"last_{group}")
        mode_weight, mode_bias = self.layer(f"modes_{group}")
        layer = {"linear_weight": weight, "linear_bias": bias}
        layer |= {"mode_weight": mode_weight, "mode_bias": mode_bias}
        return {key: tensor for key, tensor in layer.items() if tensor is not None}

    def distributions(self, student: Tensor) -> list[Distribution] | dict[str, Distribution]:
        """Return what each teacher's embedding is predicted to be: `torch.distributions` objects.

        A list, or a dict by name when `dims` was a mapping. ``-log_prob(target)`` of a teacher is
        its loss with ``full=True`` and ``per_dim=False``. Shape: batch ``(*,)``, event ``(D_t,)``.
        """
        made: list[Distribution] = []
        for group, x in enumerate(self.features(student)):
            dims = self.teachers.dims[group : group + 1] if self.depth else self.teachers.dims
            weight, bias = self.layer(f"last_{group}")
            logits: Sequence[Tensor | None] = [None] * len(dims)
            if self.modes > 1:
                logits = _project(x, *self.layer(f"modes_{group}")).unbind(-1)
            columns = split(_project(x, weight, bias), dims)
            made += [self._distribution(*pair) for pair in zip(columns, logits, strict=True)]
        return dict(zip(self.teachers.names, made, strict=True)) if self.teachers.named else made

    def _distribution(self, columns: Tensor, logits: Tensor | None) -> Distribution:
        mean, log_std = columns.unbind(-2 if logits is None else -3)
        if self.bound is not None:
            log_std = self.bound * torch.tanh(log_std / self.bound)
        normal = Independent(Normal(mean, log_std.exp()), 1)
        if logits is None:
            return normal
        return MixtureSameFamily(Categorical(logits=logits), normal)

    def extra_repr(self) -> str:
        """Describe the heads."""
        shown = show_teachers(self.in_features, self.teachers)
        if self.depth:
            shown += f", hidden={self.hidden}, activation={self.activation!r}"
        return (
            f"{shown}, depth={self.depth}, modes={self.modes}, norm={self.norm}, bound={self.bound}"
        )


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``(*, *weight.shape[:-1])`` in the dtype of the loss."""
    dtype = accumulate_dtype(x, weight)
    bias = None if bias is None else bias.flatten().to(dtype)
    out: Tensor = functional.linear(x.to(dtype), weight.flatten(0, -2).to(dtype), bias)
    out = out.unflatten(-1, weight.shape[:-1])
    return out.to(dtype)  # autocast may have made less of it
