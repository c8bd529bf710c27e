"""UNIC's ladder: each block of the encoder has a projector to every teacher, all summed up."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..functional.checks import check_shape, check_tensor, is_sequence
from ..packing import offsets
from .mlp import check_count, project, show_teachers
from .packed import PackedModule, Piece
from .teachers import Teachers

STD = 0.02  # of the weights at first

# What is kept for backward is what goes in.
_recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Ladder(PackedModule):
    r"""Project every encoder block's output to every teacher, and add the projections up.

    With the outputs :math:`x_b` of the blocks, the prediction of teacher t is

    .. math:: s_t = c_t + \sum_b W_{t,b} \, \mathrm{gelu}(V_{t,b} \, x_b + a_{t,b})

    Train the ladder together with the student, then throw it away: see `student_state_dict`.

    Args:
        in_features: width H of the encoder's blocks.
        dims: the width of each teacher, or a mapping name -> width.
        blocks: how many blocks there are.
        hidden_features: hidden width of the projectors, all but the last.
        last_hidden_features: hidden width of the last block's.
        recompute: whether to make activations anew in backward rather than to keep them.

    Shape:
        - input: a sequence of `blocks` tensors ``(*, H)``, the first block's first.
        - Returns ``(*, D)`` with ``D = sum(dims)``, packed as `mtkd.functional.alignment` takes it.

    Returns:
        The teachers' predictions, one after the other as columns. Under autocast products are
        16-bit, their sum over the blocks is float32.

    Raises:
        ValueError: a number of blocks, widths, shapes or devices that do not fit.
        TypeError: not a sequence, not a floating-point tensor.

    Note:
        A block takes one GEMM for the first layers of all teachers, and one a teacher for the
        second, batched where teachers are small; sums are made in place. What is kept for
        backward is one number a row and hidden unit, half of what layers keep; gelu is done again.
        With `recompute` only the inputs are kept, and backward does the first layers' GEMMs again,
        a sixth of forward and backward. There is one bias c a teacher; UNIC's one a block add up
        to it. The state dict has an entry for each teacher,
        ``teachers.<name>.blocks.<b>.hidden.weight`` and so on. Transforms of torch.func stop at
        what is made anew in backward.

    Source:
        Sariyildiz et al., "UNIC", ECCV 2024, arXiv 2408.05088. From the authors' code: the formula,
        the hidden widths, the blocks' outputs as they are before the encoder's last norm, weights
        that start normal with deviation .02 (theirs are cut off at 100 deviations), biases at 0,
        and one ladder for the cls token beside one for patches, which `TokenProjectors` joins.

    Example:
        >>> import torch
        >>> from mtkd.nn import Ladder
        >>> ladder = Ladder(16, {"cnn": 3, "pca": 5}, blocks=2, hidden_features=8, recompute=True)
        >>> blocks = [torch.randn(4, 10, 16, requires_grad=True) for _ in range(2)]
        >>> ladder(blocks).shape
        torch.Size([4, 10, 8])
        >>> ladder.state_dict()["teachers.pca.blocks.1.hidden.weight"].shape
        torch.Size([3072, 16])
    """

    bias: nn.Parameter

    def __init__(
        self,
        in_features: int,
        dims: Sequence[int] | Mapping[str, int],
        blocks: int,
        hidden_features: int = 768,
        last_hidden_features: int = 3072,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        counts = {"in_features": in_features, "blocks": blocks, "hidden_features": hidden_features}
        for name, count in (counts | {"last_hidden_features": last_hidden_features}).items():
            check_count(name, count, 1)
        self.teachers, self.in_features, self.recompute = Teachers.of(dims), in_features, recompute
        self.hidden = (hidden_features,) * (blocks - 1) + (last_hidden_features,)
        teachers, width = len(self.teachers.dims), sum(self.teachers.dims)
        for block, units in enumerate(self.hidden):
            self._add(f"hidden_{block}_weight", teachers * units, in_features)
            self._add(f"hidden_{block}_bias", teachers * units)
            self._add(f"last_{block}_weight", width, units)
        self._add("bias", width)
        self.reset_parameters()

    def _add(self, name: str, *shape: int) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as UNIC does: weights normal, biases 0."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=STD)
            else:
                parameter.zero_()

    def pieces(self) -> Iterator[Piece]:
        """Yield each teacher's parts of the parameters."""
        ends = offsets(self.teachers.dims)
        for teacher, name in enumerate(self.teachers.names):
            columns = (slice(*ends[teacher : teacher + 2]),)
            for block, units in enumerate(self.hidden):
                prefix = f"teachers.{name}.blocks.{block}"
                own = (slice(teacher * units, (teacher + 1) * units),)
                yield Piece(f"{prefix}.hidden.weight", f"hidden_{block}_weight", own)
                yield Piece(f"{prefix}.hidden.bias", f"hidden_{block}_bias", own)
                yield Piece(f"{prefix}.last.weight", f"last_{block}_weight", columns)
            yield Piece(f"teachers.{name}.bias", "bias", columns)

    def forward(self, input: Sequence[Tensor]) -> Tensor:
        """Return the teachers' predictions from the blocks' outputs."""
        self._check(input)
        total = self.bias + self._part(input[0], 0)
        for block, x in enumerate(input[1:], 1):
            total.add_(self._part(x, block))  # whose backward keeps neither
        return total.view(*input[0].shape[:-1], sum(self.teachers.dims))

    def _part(self, x: Tensor, block: int) -> Tensor:
        """Return a block's part of the sum, ``(N, D)``."""
        if self.recompute:
            return _recomputed(self._both, x, block)  # type: ignore[no-any-return]
        return _recomputed(self._last, self._hidden(x, block), block)  # type: ignore[no-any-return]

    def _both(self, x: Tensor, block: int) -> Tensor:
        return self._last(self._hidden(x, block), block)

    def _hidden(self, x: Tensor, block: int) -> Tensor:
        """Return hidden units ``(N, T * hidden)``, before their activation."""
        rows = x.reshape(x.shape[:-1].numel(), self.in_features)
        weight, bias = (getattr(self, f"hidden_{block}_{kind}") for kind in ("weight", "bias"))
        return functional.linear(rows, weight, bias)

    def _last(self, hidden: Tensor, block: int) -> Tensor:
        x = functional.gelu(hidden).unflatten(1, (len(self.teachers.dims), -1))
        return project(x, getattr(self, f"last_{block}_weight"), None, self.teachers.dims)

    def _check(self, input: Any) -> None:
        self.check_whole()
        if not is_sequence(input):
            kind = type(input).__name__
            raise TypeError(f"input: expected a sequence of tensors, one a block, got {kind}")
        if len(input) != len(self.hidden):
            expected = f"{len(self.hidden)} tensors, one a block"
            raise ValueError(f"input: expected {expected}, got {len(input)}")
        check_tensor("input[0]", input[0])
        for block, x in enumerate(input):
            check_tensor(f"input[{block}]", x, input[0].device)
            check_shape(f"input[{block}]", x, (*input[0].shape[:-1], self.in_features))

    def extra_repr(self) -> str:
        """Describe the ladder."""
        shown = show_teachers(self.in_features, self.teachers)
        return f"{shown}, hidden={self.hidden}, recompute={self.recompute}"
