"""Consensus of the messages that reach a node: the vote that makes pseudo-labels."""

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..reference.columns import accumulate_dtype
from ..reference.consensus import KERNELS
from .checks import check_number, check_shape, check_tensor, is_sequence

METHODS = ("mean", "median", "trimmed_mean")


class Consensus(NamedTuple):
    """A vote, how much of the weight agrees with it, and the share of each message."""

    consensus: Tensor
    confidence: Tensor
    weights: Tensor


def consensus(
    messages: Tensor | Sequence[Tensor],
    *,
    method: str = "mean",
    class_dim: int | None = None,
    weight: Tensor | None = None,
    kernel: str | None = None,
    bandwidth: float | None = None,
    iterations: int = 1,
    trim: float = 0.25,
    start: Tensor | None = None,
    scale_dims: Sequence[int] | None = None,
    logits: bool = True,
) -> Consensus:
    r"""Vote of P messages about one map, element by element; a target without gradient.

    Each message counts for its share :math:`w_p` of the weight in the quantile function Q, and

    .. math:: c = \frac{1}{1 - 2 t} \int_t^{1 - t} Q(u)\, du

    with t = 0 for the mean, `trim` for the trimmed mean, and the limit t = 1/2 for the median: the
    midpoint of the two middle messages where the weight splits in halves between them, so of an
    even number of equal messages too. A `kernel` makes it a mean shift: `iterations` times, vote
    again with the weights :math:`w_p K(d_p)`, d the distance of a message to the last consensus,
    h the bandwidth: "flat" is 1 up to h, "linear" :math:`1 - d / h` up to h, "gaussian"
    :math:`\exp(-d^2 / 2 h^2)`.

    A NaN abstains: its message has no part in the vote about that element.

    Args:
        messages: P tensors of one shape, or one tensor with them stacked on axis 0.
        method: "mean", "median" or "trimmed_mean", of which weights make the weighted one.
        class_dim: the dimension of a message that holds classes. Votes are then about
            probabilities, and divided by their sum over the classes; where no class has a vote
            (medians may all be 0), the mean decides. Distances are total variations, 0 to 1.
        weight: of messages ``(P,)``, or of their elements, broadcastable to ``(P, *)``, for class
            maps without the classes. What is not positive counts as 0.
        kernel: None, "flat", "linear" or "gaussian".
        bandwidth: h, in units of the messages; also how far from the consensus a message may be
            that agrees with it. None: any distance, without a kernel.
        iterations: steps of the mean shift.
        trim: the share of the weight that "trimmed_mean" leaves out at each end; a message at the
            border counts for the part that is inside.
        start: where the mean shift begins, like a message (class maps: probabilities), such as an
            expert's own; None begins at the vote with the weights as they are.
        scale_dims: the dimensions of a message over which, and over the messages, distances are
            scaled to lie between 0 and 1 before a kernel, with the bandwidth in these units;
            "linear" is then :math:`1 - d` up to h. ``(-2, -1)`` is CShift's; ``()`` scales
            each element by itself; None scales nothing. Not with classes.
        logits: whether class maps are logits, softmaxed in float32 on the way, not probabilities.

    Shape:
        - messages: ``(P, *)``, or P tensors ``(*,)``.
        - weight: ``(P,)``, or broadcastable to ``(P, *)`` with as many dimensions.

    Returns:
        A tuple of the consensus, like a message, in its dtype; the confidence ``(*,)``, the share
        of the weight within `bandwidth` of the consensus, for class maps the probability of the
        winner, without the classes; and the weights, shares that sum to 1 over the
        messages: ``(P,)``, in the shape of a `weight` of elements, or with a kernel ``(P, *)``, for
        each element (0 where no message is within reach: there the consensus stays). Confidence
        and weights are float32, or float64 for float64. Where all abstain or weigh 0, the
        consensus is NaN and the confidence 0.

    Raises:
        ValueError: no messages, shapes or devices that differ, an unknown method or kernel, a
            bandwidth that is missing or not positive, an input that requires grad.
        TypeError: not a tensor, an integer dtype, a DTensor.

    Note:
        On a CPU the messages are read once where they are, not stacked or copied, whatever their
        strides, and computed in float32; on a GPU up to 16 of them without classes likewise, while
        others are stacked. A kernel's weights cost as much memory as float32 messages.
        `scale_dims` reads the messages twice a step, for class maps softmax and vote read them
        once from memory and again from a cache. Gradients to messages that are live networks' are
        an error unless it is called under ``torch.no_grad()``.

    Source:
        Leordeanu, Pirvu, Costea, Marcu, Slusanschi, Sukthankar, "Semi-Supervised Learning for
        Multi-Task Scene Understanding by Neural Graph Consensus", AAAI 2021, arXiv 2010.01086;
        Haller, Burceanu, Leordeanu, "Unsupervised Domain Adaptation through Iterative Consensus
        Shift in a Multi-Task Graph", arXiv 2103.14417, whose kernels are called flat,
        flat_weighted and gauss.

    Example:
        >>> import torch
        >>> import mtkd.functional as F
        >>> messages = torch.tensor([[1.0, 5.0], [2.0, 6.0], [4.0, 7.0], [90.0, float("nan")]])
        >>> F.consensus(messages, method="median", bandwidth=2.0)[:2]
        (tensor([3., 6.]), tensor([0.7500, 0.7500]))
        >>> shifted = F.consensus(messages, method="median", kernel="flat", bandwidth=2.0)
        >>> shifted.consensus
        tensor([2., 6.])
        >>> shifted.weights[:, 0]
        tensor([0.3333, 0.3333, 0.3333, 0.0000])
        >>> F.consensus(torch.tensor([[0.0, 9.0], [0.0, -9.0]]), class_dim=0).confidence
        tensor(0.5000)
    """
    votes = list(messages) if is_sequence(messages) else _unbound(messages)
    class_dim = _check_messages(votes, class_dim)
    pixels = [size for d, size in enumerate(votes[0].shape) if d != class_dim]
    _check_kernel(kernel, bandwidth, iterations, start)
    if weight is not None:
        _check_weight(weight, len(votes), pixels, votes[0].device)
    if start is not None:
        check_tensor("start", start, votes[0].device)
        check_shape("start", start, votes[0].shape)
    _check_no_gradient([*votes, weight, start])
    shift = _Shift(
        votes,
        None if weight is None else _spread(weight, pixels),
        class_dim,
        bool(logits),
        _trim_of(method, trim),
        KERNELS.index(kernel or KERNELS[0]),
        float("inf") if bandwidth is None else float(bandwidth),
    )
    if scale_dims is None:
        center, confidence, shares = shift.run(iterations, start)
    else:
        center, confidence, shares = shift.scaled(iterations, start, _scaled(shift, scale_dims))
    if kernel is None:
        dtype = accumulate_dtype(votes[0])
        shares = _shares(votes[0].new_ones(len(votes)) if weight is None else weight, dtype)
    return Consensus(center, confidence, shares)


class _Shift(NamedTuple):
    """The arguments of the operator, but those that change from step to step."""

    messages: list[Tensor]
    weight: Tensor | None
    class_dim: int | None
    logits: bool
    trim: float
    kernel: int
    bandwidth: float

    def run(
        self,
        iterations: int,
        start: Tensor | None,
        low: Tensor | None = None,
        unit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        messages, weight, *settings = self
        return ops.consensus(messages, weight, start, low, unit, *settings, iterations)  # type: ignore[no-any-return]

    def scaled(
        self, iterations: int, start: Tensor | None, dims: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shift step by step, with the distances to each step's start scaled."""
        center = self._replace(kernel=0).run(1, None)[0] if start is None else start
        for _ in range(iterations):
            low, high = ops.consensus_spread(self.messages, center)
            if dims and center.numel():
                low, high = low.amin(dims, keepdim=True), high.amax(dims, keepdim=True)
            unit = torch.where(high > low, high - low, 1.0)
            shape = center.shape
            result = self.run(1, center, low.expand(shape), unit.expand(shape))
            center = result[0]
        return result


def _unbound(messages: Any) -> list[Tensor]:
    check_tensor("messages", messages)
    if messages.dim() < 1:
        raise ValueError("messages: expected them stacked on axis 0, got a tensor without axes")
    return list(messages.unbind())


def _check_messages(messages: list[Any], class_dim: int | None) -> int | None:
    """Check messages; return where their classes are, counted from the front."""
    if not messages:
        raise ValueError("messages: expected one message or more, got none")
    for i, message in enumerate(messages):
        check_tensor(f"messages[{i}]", message, getattr(messages[0], "device", None))
        check_shape(f"messages[{i}]", message, messages[0].shape)
        if message.dtype != messages[0].dtype:
            expected, got = messages[0].dtype, message.dtype
            raise ValueError(f"messages[{i}]: expected dtype {expected}, got {got}")
    if class_dim is None:
        return None
    (class_dim,) = _dims("class_dim", [class_dim], messages[0].dim())
    if not messages[0].shape[class_dim]:
        raise ValueError(f"class_dim: expected classes, got none in dimension {class_dim}")
    return class_dim


def _dims(name: str, dims: Sequence[int], count: int) -> list[int]:
    """Return dimensions of a message counted from the front."""
    try:
        numbers = [index(d) for d in dims]
    except TypeError:
        raise TypeError(f"{name}: expected dimensions as integers, got {dims!r}") from None
    if any(not -count <= d < count for d in numbers):
        raise ValueError(
            f"{name}: expected dimensions of a message, which has {count}, got {dims!r}"
        )
    counted = [d % count for d in numbers]
    if len(set(counted)) != len(counted):
        raise ValueError(f"{name}: expected dimensions that differ, got {dims!r}")
    return counted


def _scaled(shift: _Shift, scale_dims: Sequence[int]) -> list[int]:
    if shift.class_dim is not None:
        raise ValueError(
            "scale_dims: expected None with class_dim, whose distances are from 0 to 1;"
            f" got {scale_dims!r}"
        )
    if not shift.kernel:
        raise ValueError(f"scale_dims: expected None without a kernel, got {scale_dims!r}")
    return _dims("scale_dims", scale_dims, shift.messages[0].dim())


def _check_kernel(
    kernel: str | None, bandwidth: float | None, iterations: int, start: Tensor | None
) -> None:
    if kernel is not None and kernel not in KERNELS[1:]:
        expected = ", ".join(KERNELS[1:])
        raise ValueError(f"kernel: expected None or one of {expected}, got {kernel!r}")
    if kernel is not None and bandwidth is None:
        raise ValueError(f"bandwidth: expected a positive number with kernel={kernel!r}, got None")
    if kernel is None and start is not None:
        raise ValueError("start: expected None without a kernel, got a tensor")
    if bandwidth is not None:
        check_number("bandwidth", bandwidth, positive=True)
    if not isinstance(iterations, int) or not 1 <= iterations < 1 << 31:
        raise ValueError(f"iterations: expected an integer from 1 to 2^31, got {iterations!r}")


def _trim_of(method: str, trim: float) -> float:
    """Return what a method leaves out at each end."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(trim, (int, float)) or not 0 <= trim < 0.5:
        raise ValueError(f"trim: expected a share from 0 to below 1/2, got {trim!r}")
    return {"mean": 0.0, "median": 0.5, "trimmed_mean": float(trim)}[method]


def _check_weight(weight: Any, count: int, pixels: list[int], device: torch.device) -> None:
    check_tensor("weight", weight, device)
    full = [count, *pixels]
    sizes = list(weight.shape)
    fits = len(sizes) == len(full) and all(s in (1, f) for s, f in zip(sizes, full, strict=True))
    if sizes != [count] and not (fits and sizes[0] == count):
        raise ValueError(
            f"weight: expected shape ({count},) or one that broadcasts to {tuple(full)},"
            f" got {tuple(sizes)}"
        )


def _check_no_gradient(tensors: Sequence[Tensor | None]) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(
            "messages, weight, start: expected tensors that do not require grad, since a consensus"
            " has no gradient; got requires_grad=True; detach them or use torch.no_grad()"
        )


def _spread(weight: Tensor, pixels: list[int]) -> Tensor:
    """View weights as those of every element."""
    full = len(weight), *pixels
    return (
        weight.reshape(-1, *[1] * len(pixels)).expand(full)
        if weight.dim() == 1
        else weight.expand(full)
    )


def _shares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each message's share of the weight."""
    weight = torch.where(weight > 0, weight, 0.0).to(dtype)
    total = weight.sum(0)
    return torch.where(total > 0, weight / total, 0.0)
