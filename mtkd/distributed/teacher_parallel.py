"""Heads shared out over ranks by teacher: each holds, trains and saves those of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from ..functional.checks import check_shape, check_tensor
from ..nn.packed import PackedModule
from ..nn.teachers import Teachers, Tensors
from ..packing import pack, split
from ..reduction import Weight, check_mask
from .exchange import exchange, gather, place, tell
from .reduction import reduce_over_ranks

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TeacherParallel(nn.Module):
    r"""Share heads out over ranks by teacher: parameters, gradients and optimiser state.

    Each rank holds the heads of some teachers and computes their losses for the rows of all
    ranks: students' embeddings and targets travel there, losses travel back, and in backward
    gradients take the same ways. The result, and every gradient, are those of the whole heads in
    DistributedDataParallel.

    Args:
        make_heads: a function of a mapping name -> width that returns the heads of those
            teachers, such as `mtkd.nn.GaussianHeads` or `mtkd.nn.Projectors`.
        dims: the width of each teacher, or a mapping name -> width.
        method: the heads' method that returns losses: "alignment" for `Projectors`.
        group: the ranks; by default all. Without torch.distributed there is one.

    Shape:
        - student ``(*, H)``, target ``(*, D)`` or one tensor a teacher, mask ``(*, T)`` bool: this
          rank's rows and all teachers. Ranks may have different numbers of rows, even none.
        - weight ``(T,)`` or ``(*, T)``, or a callable of this rank's matrix and mask.

    Returns:
        What `reduce_over_ranks` makes of the matrix: the mean over what counts on any rank, the
        same on every rank; for reduction "none" this rank's matrix ``(*, T)``.

    Raises:
        ValueError: more ranks than teachers, shapes that do not fit, ranks whose arguments differ.
        TypeError: `make_heads` that makes something else, not a floating-point tensor.

    Note:
        Keep this module out of DDP and FSDP: wrap the student alone, or see `keep_apart` for DDP
        and `ignored_params` of `fully_shard`. The heads' gradients are averaged over ranks, as the
        student's are, and need no reduction. Clip the norms of student and heads separately, since
        that of the heads differs between ranks. Every rank must make the same calls, backward
        among them.

        Teachers go to ranks by their numbers of parameters, largest first, each to the rank with
        the least. With N rows on all ranks, a rank receives ``N (H + D_own)`` numbers in
        forward and its rows' gradients from all ranks in backward. The host waits once, for
        the numbers of rows.

        Heads are first made whole on every rank, so that they start as one process's with the same
        seed; only a rank's own stay. The state dict has those, ``teachers.<name>...``; it loads
        from these or from one of all teachers. Names of parameters, and thus of the optimiser's
        state, begin with ``rank_<r>.``, for no two ranks have the same.

    Example:
        >>> import torch
        >>> from mtkd.distributed import TeacherParallel
        >>> from mtkd.nn import GaussianHeads
        >>> heads = TeacherParallel(lambda dims: GaussianHeads(16, dims), {"cnn": 3, "pca": 5})
        >>> student = torch.randn(4, 16, requires_grad=True)
        >>> heads(student, torch.randn(4, 8)).backward()  # one process holds all heads
        >>> heads.own
        ('cnn', 'pca')
    """

    expendable = True
    order: Tensor
    owner: Tensor

    def __init__(
        self,
        make_heads: Callable[[Mapping[str, int]], nn.Module],
        dims: Sequence[int] | Mapping[str, int],
        *,
        method: str = "forward",
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.teachers, self.method, self.group = Teachers.of(dims), method, group
        self.rank, self.ranks = place(group)
        self._child = f"rank_{self.rank}"
        self.keys = self._make(make_heads)
        order = [teacher for share in self.shares for teacher in share]
        order = sorted(range(len(order)), key=order.__getitem__)
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("owner", torch.tensor(self.rank), persistent=False)  # see _counts
        self.register_state_dict_post_hook(_shorten)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_lengthen)  # type: ignore[no-untyped-call]

    def _make(self, make_heads: Callable[[Mapping[str, int]], nn.Module]) -> tuple[str, ...]:
        """Make this rank's heads, a part of the whole; return the whole's keys."""
        dims = dict(zip(self.teachers.names, self.teachers.dims, strict=True))
        share((1,) * len(dims), self.ranks)  # enough teachers, before anything is made
        whole = make_heads(dims)
        if not isinstance(whole, PackedModule):
            expected = "GaussianHeads or Projectors of mtkd.nn"
            raise TypeError(f"make_heads: expected {expected}, got {type(whole).__name__}")
        if not hasattr(whole, self.method):
            raise ValueError(f"method: expected one of {type(whole).__name__}, got {self.method!r}")
        state = whole.state_dict()
        with torch.device("meta"):  # takes no memory, draws no random numbers
            each = [make_heads({name: width}) for name, width in dims.items()]
            sizes = [sum(p.numel() for p in heads.parameters()) for heads in each]
            self.shares = share(sizes, self.ranks)
            self.own = tuple(self.teachers.names[teacher] for teacher in self.shares[self.rank])
            own = make_heads({name: dims[name] for name in self.own})
        own.load_state_dict({key: state[key] for key in own.state_dict()}, assign=True)
        self.add_module(self._child, own)
        return tuple(state)

    @property
    def heads(self) -> PackedModule:
        """The heads of this rank's teachers."""
        return self.get_submodule(self._child)  # type: ignore[return-value]

    @property
    def paths(self) -> Any:
        """The keys of the state dict as paths of attributes."""
        return self.heads.paths

    def _fqn_modifiers(self) -> dict[str, str]:
        """See `PackedModule`."""
        return {"teachers": "paths"}

    def forward(
        self,
        student: Tensor,
        target: Tensors,
        *,
        mask: Tensor | None = None,
        weight: Weight = None,
        denominator: float | Tensor | None = None,
        reduction: str = "mean",
        **options: Any,
    ) -> Tensor:
        """Return the loss of all ranks' rows; `options` go to the heads' method."""
        return reduce_over_ranks(
            self._matrix(student, target, mask, options),
            weight=weight,
            mask=mask,
            denominator=denominator,
            reduction=reduction,
            group=self.group,
        )

    def _matrix(
        self, student: Tensor, target: Tensors, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """Return this rank's losses of all teachers, ``(*, T)``."""
        packed = self._check(student, target, mask)
        leading, teachers = student.shape[:-1], len(self.teachers.dims)
        rows = student.reshape(-1, student.shape[-1])
        counts = self._counts(rows, packed, mask)
        students = gather(rows, counts, self.group)
        targets = self._columns(packed.reshape(-1, packed.shape[-1]), self.teachers.dims, counts)
        masks = mask
        if mask is not None:
            masks = self._columns(mask.reshape(-1, teachers), [1] * teachers, counts)
        losses = getattr(self.heads, self.method)
        matrix: Tensor = losses(students, targets, mask=masks, reduction="none", **options)
        if students.requires_grad and self.ranks > 1:  # the heads' gradients are averaged alone
            students.register_hook(lambda grad: grad * self.ranks)
        if matrix.requires_grad and self.ranks > 1:
            matrix.register_hook(lambda grad: grad / self.ranks)
        shapes = [(len(rows), len(share)) for share in self.shares]
        parts = exchange(matrix.split(counts), shapes, self.group)
        return torch.cat(parts, 1).index_select(1, self.order).view(*leading, teachers)

    def _columns(self, rows: Tensor, widths: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Send each rank its teachers' columns; return this rank's, of the rows of all."""
        columns = split(rows, widths)
        blocks = [torch.cat([columns[teacher] for teacher in share], 1) for share in self.shares]
        width = blocks[self.rank].shape[1]
        return torch.cat(exchange(blocks, [(count, width) for count in counts], self.group))

    def _check(self, student: Any, target: Any, mask: Any) -> Tensor:
        """Raise before anything is sent; return the target's columns."""
        check_tensor("student", student)
        given = self.teachers.in_order("target", target)
        packed = given if isinstance(given, Tensor) else pack(given)[0]
        check_tensor("target", packed, student.device)
        check_shape("target", packed, (*student.shape[:-1], packed.shape[-1]))
        check_mask(mask, (*student.shape[:-1], len(self.teachers.dims)), student.device)
        return packed

    def _counts(self, rows: Tensor, target: Tensor, mask: Tensor | None) -> list[int]:
        """Return the number of rows of each rank; all else must be the same on all."""
        kinds = (_DTYPES.index(rows.dtype), _DTYPES.index(target.dtype))
        flags = (int(mask is not None), int(rows.requires_grad and torch.is_grad_enabled()))
        told = tell((len(rows), rows.shape[1], *kinds, *flags), self.owner, self.group)
        if [each.pop() for each in told] != list(range(self.ranks)):  # DDP broadcasts buffers
            expected = "heads that each rank keeps to itself, got rank 0's on all"
            raise RuntimeError(
                f"heads: expected {expected}; before DistributedDataParallel wraps the model, call"
                " mtkd.distributed.keep_apart(model), or wrap the student alone"
            )
        names = ("student's width", "student's dtype", "target's dtype", "whether there is a mask")
        for name, *values in zip(
            (*names, "whether the student requires grad"), *(each[1:] for each in told), strict=True
        ):
            if len(set(values)) > 1:
                shown = (str(_DTYPES[v] if "dtype" in name else v) for v in values)
                got = ", ".join(shown)
                raise ValueError(f"{name}: expected the same on all ranks, got {got}")
        return [each[0] for each in told]

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the state dict of all teachers, on the CPU, on rank 0; on others an empty one.

        Every rank must call it. It is that of the heads in one process.
        """
        own = {key: value.cpu().clone() for key, value in self.state_dict().items()}
        if self.ranks == 1:
            return own
        every: list[Any] | None = [None] * self.ranks if self.rank == 0 else None
        distributed.gather_object(own, every, group=self.group, group_dst=0)
        found = {key: value for each in every or () for key, value in each.items()}
        return {key: found[key] for key in self.keys if found}

    def extra_repr(self) -> str:
        """Describe which teachers are here."""
        return f"rank {self.rank} of {self.ranks}, own={self.own}"


def keep_apart(model: nn.Module) -> None:
    """Have DistributedDataParallel leave alone what ranks hold of their own in a model.

    Call it before the model is wrapped, if a `TeacherParallel` is inside.

    Example:
        >>> from torch import nn
        >>> from mtkd.distributed import TeacherParallel, keep_apart
        >>> from mtkd.nn import Projectors
        >>> heads = TeacherParallel(lambda dims: Projectors(4, dims), (3, 5), method="alignment")
        >>> model = nn.ModuleDict({"student": nn.Linear(8, 4), "heads": heads})
        >>> keep_apart(model)  # then DistributedDataParallel(model)
    """
    names = [
        f"{path}.{name}" if path else name
        for path, part in model.named_modules()
        if isinstance(part, TeacherParallel)
        for name, _ in (*part.named_parameters(), *part.named_buffers())
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def share(sizes: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Return each rank's teachers: the largest first, each to the rank that has the least.

    Raises:
        ValueError: more ranks than teachers.

    Example:
        >>> from mtkd.distributed.teacher_parallel import share
        >>> share((3, 8, 5, 1), 2)
        ((1, 3), (0, 2))
    """
    if ranks > len(sizes):
        expected = f"at least {ranks} teachers, one a rank"
        raise ValueError(f"dims: expected {expected}, got {len(sizes)}")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for teacher in sorted(range(len(sizes)), key=lambda teacher: -sizes[teacher]):
        least = min(shares, key=lambda own: sum(sizes[each] for each in own))
        least.append(teacher)
    return tuple(tuple(sorted(own)) for own in shares)


def _shorten(module: TeacherParallel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    longer = f"{prefix}{module._child}."
    for key in [key for key in state_dict if key.startswith(longer)]:
        state_dict[prefix + key.removeprefix(longer)] = state_dict.pop(key)


def _lengthen(module: TeacherParallel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give this rank's keys the names of its parameters, and leave out other ranks' teachers."""
    own = {piece.name for piece in module.heads.pieces()}
    for key in [key for key in module.keys if prefix + key in state_dict]:
        value = state_dict.pop(prefix + key)
        if key in own:
            state_dict[f"{prefix}{module._child}.{key}"] = value
