"""Divergences between a student's class probabilities and those of many teachers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import linear, ops
from ..packing import join_small, stack_equal
from ..reduction import Weight, reduce
from ..reference.columns import accumulate_dtype
from .checks import (
    Dims,
    Group,
    check_dims,
    check_number,
    check_shape,
    check_target,
    check_tensor,
    group_teachers,
    is_sequence,
)
from .layers import autocast, input_leading, keeps_stash

Tensors = Tensor | Sequence[Tensor]
Layer = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
DIVERGENCES = ("forward", "reverse", "jeffreys", "js")


def kl_div(
    student: Tensors,
    teacher: Tensors,
    dims: Dims | None = None,
    *,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature_scale: bool = True,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Divergence of a student's distribution over classes from every teacher's.

    With :math:`p_T = \text{softmax}(\text{teacher} / \tau)` and
    :math:`p_S = \text{softmax}(\text{student} / \tau)` over the classes of a teacher, the loss of a
    row and teacher is :math:`\tau^2` times

    .. math::
        \text{forward:} \quad & KL(p_T \,\|\, p_S) = \sum_c p_T \log (p_T / p_S) \\
        \text{reverse:} \quad & KL(p_S \,\|\, p_T) \\
        \text{jeffreys:} \quad & KL(p_T \,\|\, p_S) + KL(p_S \,\|\, p_T) \\
        \text{js:} \quad & \beta\, KL(p_T \,\|\, m) + (1 - \beta)\, KL(p_S \,\|\, m),
            \quad m = \beta\, p_T + (1 - \beta)\, p_S

    Args:
        student: the student's logits: a head a teacher, packed with `dims` or one tensor each; or
            one head, shared by teachers of the same classes.
        teacher: the teachers' logits, like `student`, or all teachers of a shared head. They
            receive a gradient where they require one.
        dims: number of classes of each teacher, a sequence or a mapping by name; None with a tensor
            means a single teacher, or teachers that share the student's head.
        temperature: :math:`\tau`, which divides the logits of both sides.
        divergence: "forward", "reverse", "jeffreys" or "js".
        beta: the teacher's share of the mixture in "js", between 0 and 1.
        temperature_scale: multiply by :math:`\tau^2`, which keeps the size of gradients.
        weight: weights of teachers ``(T,)`` or of entries ``(*, T)``; may require grad; or a
            callable ``(matrix, mask) -> weights`` such as `mtkd.weighting.teacher_dropping`.
        mask: entries that count, ``(*, T)`` bool; whatever the others hold adds nothing.
        denominator: divides the sum, in place of the sum of the counted weights.
        reduction: "none", "mean" or "sum" over rows and teachers.

    Shape:
        - student, teacher: ``(*, C)`` with ``C = sum(dims)``, or sequences of ``(*, C_t)``.
        - a shared head: student ``(*, C)``, teacher ``(*, T, C)`` or T tensors ``(*, C)``.

    Returns:
        ``(*, T)`` for "none", else a 0-dim tensor; nats (times :math:`\tau^2`), float32, or
        float64 when `student` or `teacher` is float64.

    Raises:
        ValueError: shapes, widths or devices that do not fit, a setting out of its range.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        A logit of -inf is a class of probability 0: it adds nothing on its own side, and its
        gradient is 0. Where it meets a probability of the other side, a forward, reverse or
        Jeffreys divergence is inf, with gradients 0; so is every divergence of a row whose logits
        are all -inf, unless it is masked. No result is NaN unless an input holds NaN or +inf.

        For "mean" and "sum" student and teacher are read once (a row's further passes find them in
        the cache) and each gradient is written once; nothing else of size ``(*, C)`` is made. A
        shared head with a sequence of teachers is read again in backward, a teacher at a time; pack
        them to have one pass.
        16-bit tensors are read as they are and computed in float32. A teacher ``(*, T, C)`` is read
        where it lies if its last two dimensions are contiguous, else copied.

    Source:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv
        1503.02531; a head a teacher: Li et al., "Representation Consolidation for Training
        Expert Students", 2021, arXiv 2107.08039.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> student = torch.zeros(4, 8, requires_grad=True)  # heads of 3 and 5 classes
        >>> teacher = torch.zeros(4, 8)
        >>> teacher[:, 3:7] = float("-inf")  # the second teacher is sure of its last class
        >>> F.kl_div(student, teacher, (3, 5), reduction="none")[0].tolist()  # 0, log 5
        [0.0, 1.6094379425048828]
        >>> F.kl_div(torch.zeros(4, 6), torch.zeros(4, 9, 6), reduction="none").shape
        torch.Size([4, 9])
    """
    settings = _settings(divergence, beta, temperature, temperature_scale)
    calls, leading = _row_calls(student, teacher, dims)
    return reduce(
        ops.kl_div,
        [(*call, *settings) for call in calls],
        [len(call[0]) for call in calls],
        leading=leading,
        dtype=accumulate_dtype(*(tensor for call in calls for tensor in call[1:])),
        device=calls[0][1].device,
        weight=weight,
        mask=mask,
        denominator=denominator,
        reduction=reduction,
        shared=isinstance(student, Tensor) and len(calls) > 1,
    )


def linear_kl_div(
    input: Tensors,
    linear_weight: Tensors,
    teacher: Tensor | Sequence[Tensor | Layer],
    dims: Dims | None = None,
    *,
    linear_bias: Tensors | None = None,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    temperature_scale: bool = True,
    weight: Weight = None,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""`kl_div` fused with the student's heads, and with those of the teachers where wanted.

    Equal to `kl_div` with :math:`\text{student} = W x + b`, but neither these logits nor their
    gradient is ever held whole. Nor are the teachers' logits, where teachers are given as features
    and the layer that makes logits of them: so features can be stored in place of logits.

    Args:
        input: what the heads take, shared by the teachers or one tensor each.
        linear_weight: the heads' rows of all teachers, or one tensor a teacher.
        teacher: the teachers' logits; or ``(features, weight)`` or ``(features, weight, bias)`` of
            each. Any floating dtype, no gradient.
        dims: number of classes of each teacher, a sequence or a mapping by name; None with a tensor
            means a single teacher, or what the teachers' layers have.
        linear_bias: biases of `linear_weight`.
        temperature: :math:`\tau`; see `kl_div`, as for all that follow.
        divergence: "forward", "reverse", "jeffreys" or "js".
        beta: the teacher's share of the mixture in "js".
        temperature_scale: multiply by :math:`\tau^2`.
        weight: weights of teachers or entries.
        mask: entries that count.
        denominator: divides the sum.
        reduction: "none", "mean" or "sum".

    Shape:
        - input ``(*, H)``, linear_weight ``(C, H)``, linear_bias ``(C,)``, teacher ``(*, C)`` with
          ``C = sum(dims)``; or T layers of ``(*, F_t)``, ``(C_t, F_t)`` and ``(C_t,)``.
        - a teacher's own input: sequences of T such tensors, each with ``T = 1``. A head that is
          shared by teachers is for `kl_div`: its logits are no wider than one teacher's.

    Returns:
        As `kl_div`; float64 when `input` or `linear_weight` is float64.

    Raises:
        ValueError: shapes, widths or devices that do not fit, a setting out of its range, a teacher
            that requires grad.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        Memory, GEMMs and precision are those of `linear_gaussian_nll`; a tile holds all classes of
        a teacher. Teachers' layers take one GEMM more each, two where the loss is computed again.

    Source:
        As for `kl_div`.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> student = torch.randn(4, 16, requires_grad=True)
        >>> heads = torch.zeros(8, 16, requires_grad=True)  # of 3 and 5 classes
        >>> logits = torch.zeros(4, 8)
        >>> F.linear_kl_div(student, heads, logits, (3, 5)).item()
        0.0
        >>> stored = [(torch.ones(4, 6), torch.zeros(classes, 6)) for classes in (3, 5)]
        >>> F.linear_kl_div(student, heads, stored).item()
        0.0
    """
    settings = _settings(divergence, beta, temperature, temperature_scale)
    calls, leading = _linear_calls(input, linear_weight, teacher, dims, linear_bias)
    width = sum(call[2].shape[0] for call in calls)
    stash = keeps_stash(calls, leading.numel(), width, weight, reduction)
    budget = linear.workspace_size()
    return reduce(
        ops.linear_kl_div,
        [(*call, *settings, budget, stash) for call in calls],
        [len(call[0]) for call in calls],
        leading=leading,
        dtype=accumulate_dtype(*(tensor for call in calls for tensor in call[1:3])),
        device=calls[0][1].device,
        weight=weight,
        mask=mask,
        denominator=denominator,
        reduction=reduction,
    )


def _settings(
    divergence: str, beta: float, temperature: float, temperature_scale: bool
) -> tuple[float, float, bool, float, float]:
    """Check the settings of a loss; return them as operators take them."""
    if divergence not in DIVERGENCES:
        expected = ", ".join(DIVERGENCES)
        raise ValueError(f"divergence: expected one of {expected}, got {divergence!r}")
    check_number("beta", beta, positive=True)
    if beta >= 1:
        raise ValueError(f"beta: expected a number between 0 and 1, got {beta!r}")
    check_number("temperature", temperature, positive=True)
    scale = float(temperature) ** 2 if temperature_scale else 1.0
    weights = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "jeffreys": (1.0, 1.0)}
    mixture = divergence == "js"
    shares = (float(beta), 1.0 - beta) if mixture else weights[divergence]
    return *shares, mixture, float(temperature), scale


def _row_calls(student: Any, teacher: Any, dims: Dims | None) -> tuple[list[tuple[Any, ...]], Any]:
    """Check the logits; return calls (dims, student, teacher) on rows, and the leading dimensions.

    One student head and a sequence of teachers are calls that share the student.
    """
    shared = isinstance(student, Tensor) and is_sequence(teacher)
    if shared:
        student = [student] * len(teacher)
    groups = group_teachers(dims, student=student, teacher=teacher)
    first = groups[0].tensors[0]
    check_tensor(f"student{groups[0].suffix}", first)
    leading = first.shape[:-1]
    calls = [_row_arguments(group, leading) for group in groups]
    if shared:  # the head stays one
        teachers = join_small([(dims, teacher) for dims, _, teacher in calls])
        return [(dims, calls[0][1], teacher) for dims, teacher in teachers], leading
    return list(join_small(calls)), leading


def _row_arguments(group: Group, leading: Any) -> tuple[Any, ...]:
    """Check a group; return its dims, and its tensors with rows as their only leading dimension."""
    (student, teacher), suffix = group.tensors, group.suffix
    check_tensor(f"student{suffix}", student)
    check_tensor(f"teacher{suffix}", teacher, student.device)
    if student.dim() < 1:
        raise ValueError(f"student{suffix}: expected shape (*, C), got a 0-dim tensor")
    classes, rows = student.shape[-1], leading.numel()
    check_shape(f"student{suffix}", student, (*leading, classes))
    if teacher.dim() == student.dim() + 1 and group.dims is None:
        teachers = teacher.shape[-2]
        check_shape(f"teacher{suffix}", teacher, (*leading, teachers, classes))
        dims = check_dims((classes,) * teachers, teachers * classes, f"teacher{suffix}")
    else:
        check_shape(f"teacher{suffix}", teacher, student.shape)
        dims = check_dims(group.dims, classes, f"student{suffix}")
    return dims, student.reshape(rows, classes), teacher.reshape(rows, sum(dims))


class _Layers(NamedTuple):
    """Teachers given as features and the layers that make logits of them."""

    features: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor | None]


def _linear_calls(
    input: Any, linear_weight: Any, teacher: Any, dims: Dims | None, linear_bias: Any
) -> tuple[list[tuple[Any, ...]], Any]:
    """Check the arguments; return calls (dims, input, weight, ...) on rows, and leading dimensions.

    A shared input's layers of teachers are one argument of one call.
    """
    shared = not is_sequence(input)
    given = None if shared and is_sequence(teacher) else teacher
    groups = group_teachers(
        dims, input=input, linear_weight=linear_weight, teacher=given, linear_bias=linear_bias
    )
    leading = input_leading(groups[0])
    if shared and is_sequence(teacher):
        return [_linear_arguments(groups[0], leading, teacher)], leading
    calls = [_linear_arguments(group, leading, None) for group in groups]
    if any(call[4] is None for call in calls):
        return calls, leading
    stacked = stack_equal([call[:5] for call in calls], columns=(-2, -1, -1))
    return [(*call, [], [], []) for call in stacked], leading


def _linear_arguments(group: Group, leading: Any, layers: Any) -> tuple[Any, ...]:
    """Check a group; return dims, input ``(N, H)``, the heads, the teacher's logits or layers."""
    (input, weight, teacher, bias), suffix = group.tensors, group.suffix
    check_tensor(f"input{suffix}", input)
    check_tensor(f"linear_weight{suffix}", weight, input.device)
    features, rows = input.shape[-1], leading.numel()
    check_shape(f"input{suffix}", input, (*leading, features))
    if weight.dim() != 2 or weight.shape[1] != features:
        raise ValueError(
            f"linear_weight{suffix}: expected shape (C, H), H = {features} as in input,"
            f" got shape {tuple(weight.shape)}"
        )
    width = weight.shape[0]
    if bias is not None:
        check_tensor(f"linear_bias{suffix}", bias, input.device)
        check_shape(f"linear_bias{suffix}", bias, (width,))
    head = autocast(input.reshape(rows, features)), autocast(weight), bias
    if layers is None and not is_sequence(teacher):
        check_target(f"teacher{suffix}", teacher, input.device)
        check_shape(f"teacher{suffix}", teacher, (*leading, width))
        dims = check_dims(group.dims, width, f"linear_weight{suffix}")
        return dims, *head, teacher.reshape(rows, width), [], [], []
    made = _teacher_layers([teacher] if layers is None else layers, leading, input, suffix)
    classes = [layer.shape[0] for layer in made.weights]
    dims = check_dims(group.dims or classes, width, f"linear_weight{suffix}")
    if list(dims) != classes:
        raise ValueError(f"dims: expected {tuple(classes)} like teacher, got {dims}")
    return dims, *head, None, *made


def _teacher_layers(layers: Sequence[Any], leading: Any, input: Tensor, suffix: str) -> _Layers:
    """Check the teachers' features ``(*, F_t)`` and layers; return them on rows."""
    made = _Layers([], [], [])
    for index, layer in enumerate(layers):
        name = f"teacher{suffix or f'[{index}]'}"
        if not is_sequence(layer) or len(layer) not in (2, 3):
            got = f"{len(layer)} items" if is_sequence(layer) else type(layer).__name__
            raise TypeError(f"{name}: expected (features, weight) or with a bias, got {got}")
        features, weight, bias = (*layer, None)[:3]
        for part, tensor in enumerate(layer[:2] if bias is None else layer):
            check_target(f"{name}[{part}]", tensor, input.device)
        width = features.shape[-1] if features.dim() else 0
        check_shape(f"{name}[0]", features, (*leading, width))
        if weight.dim() != 2 or weight.shape[1] != width:
            shape = tuple(weight.shape)
            raise ValueError(f"{name}[1]: expected shape (C, {width}), got shape {shape}")
        if bias is not None:
            check_shape(f"{name}[2]", bias, (weight.shape[0],))
        made.features.append(features.reshape(leading.numel(), width))
        made.weights.append(weight)
        made.biases.append(bias)
    return made
