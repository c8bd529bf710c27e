"""What launches the Triton kernels that `make compile-check` compiles, as dispatch does.

`configurations()` is the table: a name, and a function that calls launchers with tensors that have
no memory. Dtypes, shapes, strides and alignment decide which code is compiled, so sizes are those
of training, with few rows and with many, some divisible by 16 and some not. A new kernel file
adds a function of its configurations to FAMILIES.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtkd.triton import alignment, common, consensus, divergence, gaussian, linear_gaussian, votes

Configuration = tuple[str, Callable[[], Any]]
COMMON = (torch.bfloat16, torch.float32)
EVERY = (*COMMON, torch.float16, torch.float64)
ODD = (1500, 1, 17, 96, 97, 5)


class Rows(NamedTuple):
    """A Gaussian loss in one configuration; modes=0 has no mode logits."""

    name: str
    rows: int
    dims: tuple[int, ...]
    modes: int = 0
    masked: bool = False
    bound: float | None = None
    per_dim: bool = True
    full: bool = False
    dtypes: tuple[torch.dtype, ...] = COMMON

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The operator's arguments."""
        new = partial(torch.empty, dtype=dtype, device="meta")
        width, teachers, inner = sum(self.dims), len(self.dims), (self.modes,) * (self.modes > 0)
        mask = new(self.rows, teachers, dtype=torch.bool) if self.masked else None
        mean, log_std = new(self.rows, *inner, width), new(self.rows, *inner, width)
        logits = new(self.rows, self.modes, teachers) if self.modes else None
        settings = self.bound, self.per_dim, self.full
        return mask, self.dims, mean, log_std, new(self.rows, width), logits, *settings


GAUSSIAN = (
    Rows("gaussian-eight", 8192, (1024,) * 8, dtypes=EVERY),
    Rows("gaussian-wide", 16, (8192,)),
    Rows("gaussian-many", 512, (64,) * 1024, masked=True),
    Rows("gaussian-narrow", 33, (16,) * 130, masked=True, bound=1.0),
    Rows("gaussian-bounded", 8192, (768, 1024, 1280), bound=4.0),
    Rows("gaussian-odd", 37, ODD, masked=True, bound=1.5, per_dim=False, full=True, dtypes=EVERY),
    Rows("gaussian-tiny", 5, (3, 1, 2), full=True),
    Rows("mixture-eight", 8192, (1024,) * 8, modes=4),
    Rows("mixture-bounded", 8192, (768, 1280), modes=16, masked=True, bound=4.0),
    Rows("mixture-hundred", 512, (256,) * 4, modes=100),
    Rows("mixture-odd", 37, ODD, modes=2, masked=True, full=True, dtypes=EVERY),
    Rows("mixture-tiny", 5, (3, 1, 2), modes=3, bound=1.0, per_dim=False),
)


def gaussian_launches(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launchers of the loss on tensors of its own, as autograd and reductions call them."""
    grad, wanted = coefficient(args), [True, True, args[5] is not None]
    same = grad.new_empty(()).expand(grad.shape)  # of a plain mean
    yield "forward", partial(gaussian.forward, *args)
    yield "backward", partial(gaussian.backward, grad, grad.new_empty(0), *args, wanted)
    yield "value_and_grad", partial(gaussian.value_and_grad, same, *args, wanted)


def gaussian_in_layers(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launcher as a fused layer calls it: parameters side by side, in float32, and biases."""
    mask, dims, mean, log_std, target, logits, *settings = args
    wide = torch.stack([mean, log_std], 1)
    (mean, log_std), narrow = wide.float().unbind(1), wide.unbind(1)
    logits = None if logits is None else logits.float()
    args = (mask, dims, mean, log_std, target, logits, *settings)
    launch = partial(gaussian.with_biases, (wide[0, 0], wide[0, 1]))
    yield "in layers, forward", partial(launch, None, args, None, None, None)
    yield "in layers, in place", partial(launch, coefficient(args), args, mean, log_std, logits)
    yield "in layers, narrowed", partial(launch, coefficient(args), args, *narrow, logits)


def coefficient(args: tuple[Any, ...]) -> Tensor:
    """A factor for each loss, in the dtype of losses."""
    _, dims, mean, *_ = args
    dtype = torch.promote_types(mean.dtype, torch.float32)
    return torch.empty(len(mean), len(dims), dtype=dtype, device=mean.device)


def gaussian_configurations() -> Iterator[Configuration]:
    """Every role in every dtype, and inside of a layer in bfloat16."""
    for case in GAUSSIAN:
        for dtype in case.dtypes:
            for role, launch in gaussian_launches(case.arguments(dtype)):
                yield f"{case.name} {str(dtype).removeprefix('torch.')} {role}", launch
        for role, launch in gaussian_in_layers(case.arguments(torch.bfloat16)):
            yield f"{case.name} bfloat16 {role}", launch


def scale_configurations() -> Iterator[Configuration]:
    """The factor of a reduction, for gradients of every dtype."""
    for dtype in EVERY:
        x = torch.empty(8192, 8192, dtype=dtype, device="meta")
        factor = coefficient((None, (1,), x))[0, 0]
        yield f"scale {str(dtype).removeprefix('torch.')}", partial(common.scale_, [x], factor)


class Aligned(NamedTuple):
    """An alignment loss in one configuration; `weights` are those of the operator's terms."""

    name: str
    rows: int
    dims: tuple[int, ...]
    weights: tuple[float, float, float, float] = (0.5, 0.5, 0.0, 0.0)
    masked: bool = False
    standard: bool = False
    dispersed: bool = False
    dtypes: tuple[torch.dtype, ...] = COMMON

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The operator's arguments."""
        new = partial(torch.empty, dtype=dtype, device="meta")
        width, teachers = sum(self.dims), len(self.dims)
        mask = new(self.rows, teachers, dtype=torch.bool) if self.masked else None
        numbers = partial(new, dtype=torch.promote_types(dtype, torch.float32))
        shift, scale = (numbers(width) if self.standard else None for _ in range(2))
        dispersion = numbers(teachers) if self.dispersed else None
        pair = new(self.rows, width), new(self.rows, width)
        return mask, self.dims, *pair, shift, scale, dispersion, *self.weights, 1.0, 1e-8


EVERY_TERM = (0.4, 0.3, 0.2, 0.1)
ALIGNED = (
    Aligned("alignment-four", 25216, (768,) * 4, dtypes=EVERY),
    Aligned("alignment-standard", 25216, (768, 1024, 1280), masked=True, standard=True),
    Aligned("alignment-wide", 16, (8192,), standard=True),
    Aligned("alignment-many", 512, (64,) * 1024, masked=True),
    Aligned("alignment-narrow", 33, (16,) * 130, weights=(1.0, 0.0, 0.0, 0.0)),
    Aligned("alignment-mse", 8192, (1024,) * 8, weights=(0.0, 0.0, 1.0, 0.0), standard=True),
    Aligned("alignment-smooth", 8192, (1024,) * 8, weights=(0.0, 1.0, 0.0, 0.0)),
    Aligned("alignment-angle", 512, (1280,) * 3, weights=(0.0, 0.0, 0.0, 1.0), dispersed=True),
    Aligned("alignment-odd", 37, ODD, EVERY_TERM, True, True, True, dtypes=EVERY),
    Aligned("alignment-tiny", 5, (3, 1, 2), EVERY_TERM, standard=True),
)


def alignment_launches(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launchers of the loss on tensors of its own, as autograd and reductions call them."""
    grad = coefficient(args)
    same = grad.new_empty(()).expand(grad.shape)  # of a plain mean
    yield "forward", partial(alignment.forward, *args)
    yield "backward", partial(alignment.backward, grad, grad.new_empty(0), *args, [True])
    yield "value_and_grad", partial(alignment.value_and_grad, same, *args, [True])


def alignment_in_layers(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launcher as a fused layer calls it: the student in float32, and a bias."""
    mask, dims, student, *rest = args
    wide = (mask, dims, student.float(), *rest)
    launch = partial(alignment.with_bias, student[0])
    yield "in layers, forward", partial(launch, None, wide, None)
    yield "in layers, in place", partial(launch, coefficient(wide), wide, wide[2])
    yield "in layers, narrowed", partial(launch, coefficient(wide), wide, student)


def alignment_configurations() -> Iterator[Configuration]:
    """Every role in every dtype, and inside of a layer in bfloat16."""
    for case in ALIGNED:
        for dtype in case.dtypes:
            for role, launch in alignment_launches(case.arguments(dtype)):
                yield f"{case.name} {str(dtype).removeprefix('torch.')} {role}", launch
        for role, launch in alignment_in_layers(case.arguments(torch.bfloat16)):
            yield f"{case.name} bfloat16 {role}", launch


class Divergence(NamedTuple):
    """A divergence in one configuration; `weights` are forward's, reverse's, whether they mix."""

    name: str
    rows: int
    dims: tuple[int, ...]
    weights: tuple[float, float, bool] = (1.0, 0.0, False)
    masked: bool = False
    shared: bool = False
    dtypes: tuple[torch.dtype, ...] = COMMON

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The operator's arguments."""
        new = partial(torch.empty, dtype=dtype, device="meta")
        mask = new(self.rows, len(self.dims), dtype=torch.bool) if self.masked else None
        student = new(self.rows, self.dims[0] if self.shared else sum(self.dims))
        return mask, self.dims, student, new(self.rows, sum(self.dims)), *self.weights, 2.0, 4.0


REVERSE, JEFFREYS, MIXED = (0.0, 1.0, False), (1.0, 1.0, False), (0.5, 0.5, True)
DIVERGENCES = (
    Divergence("kl-four", 4096, (1000,) * 4, dtypes=EVERY),
    Divergence("kl-reverse", 4096, (1000,) * 4, REVERSE),
    Divergence("kl-jeffreys", 4096, (1000,) * 4, JEFFREYS, dtypes=EVERY),
    Divergence("kl-js", 4096, (1000,) * 4, MIXED, dtypes=EVERY),
    Divergence("kl-wide", 512, (150_000,), MIXED),
    Divergence("kl-heads", 8192, (10, 100, 21_841), masked=True),
    Divergence("kl-many", 512, (10,) * 1024, JEFFREYS, masked=True),
    Divergence("kl-odd", 37, ODD, MIXED, masked=True, dtypes=EVERY),
    Divergence("kl-tiny", 5, (3, 1, 2), REVERSE),
    Divergence("kl-shared", 4096, (1000,) * 32, masked=True, shared=True, dtypes=EVERY),
    Divergence("kl-shared-js", 512, (150_000,) * 4, MIXED, shared=True),
    Divergence("kl-shared-jeffreys", 512, (10,) * 64, JEFFREYS, shared=True),
)


def divergence_launches(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launchers of the loss on tensors of its own, as autograd and reductions call them."""
    grad = coefficient(args)
    same = grad.new_empty(()).expand(grad.shape)  # of a plain mean
    yield "forward", partial(divergence.forward, *args)
    backward = partial(divergence.backward, grad, grad.new_empty(0), *args)
    for wanted in ([True, False], [False, True], [True, True]):
        yield f"backward {wanted}", partial(backward, wanted)
    yield "value_and_grad", partial(divergence.value_and_grad, same, *args, [True, False])


def divergence_in_layers(args: tuple[Any, ...]) -> Iterator[Configuration]:
    """The launcher as a fused layer calls it: the student in float32, and a bias."""
    mask, dims, student, *rest = args
    wide = (mask, dims, student.float(), *rest)
    launch = partial(divergence.with_bias, student[0])
    yield "in layers, forward", partial(launch, None, wide, None)
    yield "in layers, in place", partial(launch, coefficient(wide), wide, wide[2])
    yield "in layers, narrowed", partial(launch, coefficient(wide), wide, student)


def divergence_configurations() -> Iterator[Configuration]:
    """Every role in every dtype, and inside of a layer in bfloat16."""
    for case in DIVERGENCES:
        for dtype in case.dtypes:
            for role, launch in divergence_launches(case.arguments(dtype)):
                yield f"{case.name} {str(dtype).removeprefix('torch.')} {role}", launch
        if not case.shared:
            for role, launch in divergence_in_layers(case.arguments(torch.bfloat16)):
                yield f"{case.name} bfloat16 {role}", launch


class Layers(NamedTuple):
    """A Gaussian loss fused with the GEMM that makes its parameters, in one configuration."""

    name: str
    rows: int
    dims: tuple[int, ...]
    features: int
    bias: bool = True
    masked: bool = False
    bound: float | None = None
    full: bool = False

    def tile(self, dtype: torch.dtype, grad: torch.dtype | None) -> Callable[[], Any]:
        """The launcher, with gradients of a dtype or without any."""
        new = partial(torch.empty, dtype=dtype, device="meta")
        width, teachers = sum(self.dims), len(self.dims)
        return partial(
            linear_gaussian.tile,
            new(self.rows, self.features),
            new(2, 2 * width, self.features),
            new(2, 2 * width) if self.bias else None,
            slice(width, 2 * width),
            new(self.rows, teachers, dtype=torch.bool) if self.masked else None,
            self.dims,
            new(self.rows, width),
            (self.bound, True, self.full),
            None if grad is None else new(self.rows, teachers, dtype=torch.float32),
            None if grad is None else new(self.rows, 2, width, dtype=grad),
            with_bias_sums=self.bias,
        )


LAYERS = (
    Layers("layer-eight", 8192, (1024,) * 8, 1024),
    Layers("layer-eight-masked", 8192, (1024,) * 8, 768, masked=True, bound=4.0),
    Layers("layer-ragged", 8192, (768, 1024, 1280), 1024, masked=True, bound=4.0, full=True),
    Layers("layer-many", 512, (64,) * 256, 768, bound=4.0),
    Layers("layer-narrow", 512, (32,) * 64, 384, bias=False),
    Layers("layer-blocks", 500, (32, 64, 48), 384, masked=True),
)


def linear_gaussian_configurations() -> Iterator[Configuration]:
    """With gradients to go on with, with gradients that are kept, and without any."""
    for case in LAYERS:
        for dtype in (torch.bfloat16, torch.float16):
            for grad in (dtype, torch.float32, None):
                words = f"{dtype}, gradients {grad}".replace("torch.", "")
                yield f"{case.name} {words}", case.tile(dtype, grad)


class Votes(NamedTuple):
    """A vote in one configuration; together, teachers have one vote with weights."""

    name: str
    rows: int
    teachers: int
    classes: int
    hard: bool = True
    together: bool = False
    masked: bool = False
    sequence: bool = False
    dtypes: tuple[torch.dtype, ...] = COMMON

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The operator's arguments."""
        new = partial(torch.empty, dtype=dtype, device="meta")
        columns = 1 if self.together else self.teachers
        mask = new(self.rows, columns, dtype=torch.bool) if self.masked else None
        weight = new(self.rows, self.teachers, dtype=torch.float32) if self.together else None
        teacher = [new(self.rows, self.teachers, self.classes)]
        if self.sequence:
            teacher = [new(self.rows, self.classes) for _ in range(self.teachers)]
        dims, student = (self.classes,) * columns, new(self.rows, self.classes)
        return mask, dims, student, teacher, weight, 2.0, self.hard


VOTES = (
    Votes("votes-thirty-two", 2048, 32, 1000, dtypes=EVERY),
    Votes("votes-soft", 2048, 32, 1000, hard=False, masked=True, dtypes=EVERY),
    Votes("votes-plurality", 2048, 32, 4096, together=True, dtypes=EVERY),
    Votes("votes-mean", 2048, 32, 1024, hard=False, together=True, masked=True),
    Votes("votes-sequence", 2048, 5, 1000, hard=False, sequence=True),
    Votes("votes-many", 512, 1024, 100, masked=True),
    Votes("votes-two", 8192, 3, 2),
    Votes("votes-wide", 512, 4, 150_000, masked=True, dtypes=EVERY),
    Votes("votes-wide-soft", 512, 4, 50_257, hard=False, dtypes=EVERY),
    Votes("votes-wide-plurality", 512, 8, 21_841, together=True, dtypes=EVERY),
    Votes("votes-wide-mean", 512, 8, 21_841, hard=False, together=True, sequence=True),
)


def votes_configurations() -> Iterator[Configuration]:
    """Every role in every dtype."""
    for case in VOTES:
        for dtype in case.dtypes:
            args = case.arguments(dtype)
            grad = coefficient(args[:3])
            same = grad.new_empty(()).expand(grad.shape)  # of a plain mean
            roles = {
                "forward": partial(votes.forward, *args),
                "backward": partial(votes.backward, grad, grad.new_empty(0), *args, [True]),
                "value_and_grad": partial(votes.value_and_grad, same, *args, [True]),
            }
            for role, launch in roles.items():
                yield f"{case.name} {str(dtype).removeprefix('torch.')} {role}", launch


class Messages(NamedTuple):
    """Messages of dense maps, and how they vote."""

    name: str
    count: int
    trim: float = 0.5
    kernel: int = 0
    weight: str = ""  # of messages, or of their elements
    scaled: bool = False
    shape: tuple[int, ...] = (8, 3, 256, 256)
    dtypes: tuple[torch.dtype, ...] = COMMON

    def vote(self, dtype: torch.dtype) -> Callable[[], Any]:
        """The launcher."""
        new = partial(torch.empty, device="meta", dtype=dtype)
        wide = partial(new, dtype=torch.promote_types(dtype, torch.float32))
        messages = [new(self.shape) for _ in range(self.count)]
        every = (self.count, *self.shape)
        weight = {
            "": None,
            "messages": wide(self.count, 1, 1, 1, 1).expand(every),
            "elements": wide(every),
        }[self.weight]
        scale = [wide(self.shape), wide(self.shape)] if self.scaled else [None, None]
        start = new(self.shape) if self.scaled else None
        settings = None, True, self.trim, self.kernel, 0.5, 2
        return partial(consensus.consensus, messages, weight, start, *scale, *settings)


MESSAGES = (
    Messages("consensus-median", 13, dtypes=EVERY),
    Messages("consensus-weighted-median", 13, weight="messages"),
    Messages("consensus-mean", 6, trim=0.0, weight="elements"),
    Messages("consensus-trimmed", 8, trim=0.25, shape=(5, 3, 7, 11), dtypes=EVERY),
    Messages("consensus-cshift", 13, kernel=2, scaled=True),
    Messages("consensus-mean-shift", 13, trim=0.0, kernel=3, weight="elements", dtypes=EVERY),
    Messages("consensus-most", 16, kernel=1, weight="elements", dtypes=(torch.float32,)),
)


def consensus_configurations() -> Iterator[Configuration]:
    """Every vote, up to as many messages as the kernel takes."""
    for case in MESSAGES:
        for dtype in case.dtypes:
            yield f"{case.name} {str(dtype).removeprefix('torch.')}", case.vote(dtype)


FAMILIES = (
    gaussian_configurations,
    linear_gaussian_configurations,
    alignment_configurations,
    consensus_configurations,
    divergence_configurations,
    votes_configurations,
    scale_configurations,
)


def configurations() -> Iterator[Configuration]:
    """Yield names, and what launches kernels."""
    for family in FAMILIES:
        yield from family()
