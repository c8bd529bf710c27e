"""Projectors from the student's embedding to the teachers', for cls and patch tokens too."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..functional import linear_alignment
from ..functional.checks import check_tensor, is_sequence
from .mlp import Parts, TeacherMLPs, check_count, project, show_teachers
from .teachers import Tensors


class Projectors(TeacherMLPs):
    r"""Project the student's embedding to every teacher's: linear layers, or an MLP a teacher.

    .. math:: s_t = W_t \, g(\dots g(V_t x + a_t)) + c_t

    Train them together with the student, then throw them away: see `student_state_dict`.

    Args:
        in_features: width H of the student's embedding.
        dims: the width of each teacher, or a mapping name -> width.
        hidden_features: width of hidden layers, or a float r for ``int(r * D_t)``.
        depth: number of hidden layers; 0 makes linear projectors.
        activation: g: "relu", "gelu", "silu" or "tanh".
        norm: normalise (LayerNorm) before each linear layer.
        bias: whether the linear layers have biases.

    Shape:
        - student ``(*, H)``.
        - Returns ``(*, D)`` with ``D = sum(dims)``, packed as `mtkd.functional.alignment` takes it.

    Returns:
        The teachers' predictions, one after the other as columns.

    Raises:
        ValueError: settings, widths or shapes that do not fit.
        TypeError: not a floating-point tensor.

    Note:
        The first layers of all teachers are one packed GEMM. Later layers are a batched GEMM where
        teachers are small and widths agree, else a GEMM a teacher. `alignment` fuses the last
        layers with the loss: predictions and their gradient are never held whole. Layers start as
        torch.nn.Linear's do. The state dict has an entry for each teacher,
        ``teachers.<name>.last.weight`` and so on, and loads by these names.

    Source:
        MLPs a teacher: Ranzinger et al., "AM-RADIO", CVPR 2024, arXiv 2312.06709 (recalled, not
        read in the authors' code). UNIC's sum over the encoder's blocks is `Ladder`.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> from mtkd.nn import Projectors
        >>> projectors = Projectors(16, {"cnn": 3, "pca": 5}, hidden_features=32, depth=1)
        >>> student, target = torch.randn(4, 16, requires_grad=True), torch.randn(4, 8)
        >>> loss = F.alignment(projectors(student), target, (3, 5))
        >>> torch.allclose(loss, projectors.alignment(student, target))  # in less memory
        True
        >>> projectors.state_dict()["teachers.pca.last.weight"].shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        in_features: int,
        dims: Sequence[int] | Mapping[str, int],
        *,
        hidden_features: int | float | None = None,
        depth: int = 0,
        activation: str = "gelu",
        norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, dims, hidden_features, depth, activation, norm, bias)
        widths = self.teachers.dims
        if len(self.groups) > 1:
            for group, (dim, units) in enumerate(zip(widths, self.hidden, strict=True)):
                self.add(f"last_{group}", (dim, units), (dim,))
        else:
            units = self.hidden[0] if depth else in_features
            self.add("last_0", (sum(widths), units), (sum(widths),))
        self.reset_parameters()

    def parts(self, teacher: int) -> Parts:
        """Yield the names of a teacher's layers, and where they are."""
        yield from super().parts(teacher)
        group, own = self.place(teacher, self.teachers.dims)
        yield "last", f"last_{group}", (own,)

    def forward(self, student: Tensor) -> Tensor:
        """Return the teachers' predictions."""
        if not self.depth:
            return functional.linear(self.features(student)[0], *self.layer("last_0"))
        widths = (
            [self.teachers.dims] if len(self.groups) == 1 else [(d,) for d in self.teachers.dims]
        )
        columns = [
            project(x, *self.layer(f"last_{group}"), widths[group])
            for group, x in enumerate(self.grouped(student))
        ]
        packed = columns[0] if len(columns) == 1 else torch.cat(columns, 1)
        return packed.view(*student.shape[:-1], sum(self.teachers.dims))

    def alignment(self, student: Tensor, target: Tensors, **options: Any) -> Tensor:
        """Return the loss of the predictions, with the last layers fused into it.

        `target` is ``(*, D)``, or ``(*, D_t)`` a teacher in a sequence or, when `dims` is a
        mapping, a mapping by name. Options, and what is returned, are those of
        `mtkd.functional.linear_alignment`.
        """
        return self.fused(linear_alignment, self._last_layers(), student, target, **options)

    def _last_layers(self) -> list[dict[str, Tensor]]:
        """Return the last layers as keyword arguments of `linear_alignment`."""
        names, count = (
            ("linear_weight", "linear_bias"),
            len(self.teachers.dims) if self.depth else 1,
        )
        layers: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for group in range(max(1, len(self.groups))):
            for name, packed in zip(names, self.layer(f"last_{group}"), strict=True):
                if packed is None:
                    continue
                # one split, whose backward joins the parts once; a slice each would add them all up
                whole = not self.depth or len(self.groups) > 1
                parts = [packed] if whole else packed.split(list(self.teachers.dims))
                for teacher, part in enumerate(parts, group):
                    layers[teacher][name] = part
        return layers

    def extra_repr(self) -> str:
        """Describe the projectors."""
        shown = show_teachers(self.in_features, self.teachers)
        if self.depth:
            shown += f", hidden={self.hidden}, activation={self.activation!r}"
        return f"{shown}, depth={self.depth}, norm={self.norm}"


class TokenProjectors(nn.Module):
    """Project the cls token, the first of an image, with one module, and patch tokens with another.

    Args:
        cls: a module for the cls token, such as `Projectors` or `Ladder`.
        patch: a module for the patch tokens.
        registers: how many tokens after the cls token are neither, and are left out.

    Shape:
        - input ``(*, 1 + registers + L, H)`` with L patches, or for a `Ladder` a sequence of such.
        - Returns ``(*, 1 + L, D)``.

    Returns:
        The teachers' predictions, the cls token's first, for the loss of all tokens in one call.

    Raises:
        ValueError: fewer tokens than there are cls token and registers; what the modules raise.
        TypeError: not a floating-point tensor, nor a sequence of them.

    Note:
        Tokens are read as views of the input; joining the results copies them once.

    Source:
        Sariyildiz et al., "UNIC", ECCV 2024, arXiv 2408.05088, and the authors' code.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> from mtkd.nn import Ladder, TokenProjectors
        >>> from mtkd.reduction import cls_and_patches, reduce_matrix
        >>> from mtkd.weighting import teacher_dropping
        >>> projectors = TokenProjectors(Ladder(16, (3, 5), 2, 8, 32), Ladder(16, (3, 5), 2, 8, 32))
        >>> blocks = [torch.randn(4, 10, 16, requires_grad=True) for _ in range(2)]
        >>> student, target = projectors(blocks), torch.randn(4, 10, 8)
        >>> matrix = F.alignment(student, target, (3, 5), reduction="none")  # (4, 10, 2)
        >>> reduce_matrix(cls_and_patches(matrix), weight=teacher_dropping).backward()
    """

    expendable = True

    def __init__(self, cls: nn.Module, patch: nn.Module, registers: int = 0) -> None:
        super().__init__()
        check_count("registers", registers, 0)
        self.cls, self.patch, self.registers = cls, patch, registers

    def forward(self, input: Tensor | Sequence[Tensor]) -> Tensor:
        """Return the teachers' predictions of every token but the registers."""
        several = is_sequence(input)
        tensors: Sequence[Tensor] = input if several else [input]  # type: ignore[list-item,assignment]
        for index, x in enumerate(tensors):
            name = f"input[{index}]" if several else "input"
            check_tensor(name, x)
            least = 1 + self.registers
            if x.dim() < 2 or x.shape[-2] < least:
                expected = f"(*, L, H) with at least {least} tokens"
                raise ValueError(f"{name}: expected shape {expected}, got shape {tuple(x.shape)}")
        cls = [x[..., :1, :] for x in tensors]
        patch = [x[..., 1 + self.registers :, :] for x in tensors]
        pair = (cls, patch) if several else (cls[0], patch[0])
        return torch.cat([self.cls(pair[0]), self.patch(pair[1])], -2)
