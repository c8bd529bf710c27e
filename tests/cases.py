"""The table of cases: one line a loss and configuration; generic tests run over all of them.

A case makes an operator's arguments, mask and dims first, in any dtype. Sizes are ragged, above
one block of 1024 columns, and on both sides of what kernels treat as a short teacher; gradients of
the large cases, above 4 MiB, are streamed past the caches. They are more than Triton's
interpreter can carry; the others are above one of its tiles in each dimension.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import mtkd.functional as F
from mtkd import ops
from mtkd.dispatch import Loss

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
Arguments = tuple[Any, ...]
TINY = (3, 1, 2)
# an interpreted step takes milliseconds: the widest is several tiles either way
RAGGED = (300 if INTERPRETED else 1500, 1, 17, 96, 97, 5)
MANY = (16,) * (20 if INTERPRETED else 130)


@dataclass(frozen=True)
class Case:
    """A loss in one configuration."""

    name: str
    loss: Loss
    make: Callable[..., Arguments]
    dims: tuple[int, ...]
    rows: int
    options: dict[str, Any] = field(default_factory=dict)
    large: bool = False
    float32_factor: float = 1  # how far past the usual float32 tolerance its conditioning goes

    def __str__(self) -> str:
        return self.name

    def arguments(self, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Random arguments; the same numbers, rounded, for every dtype."""
        generator = torch.Generator().manual_seed(seed)
        return self.make(generator, self.rows, self.dims, dtype, **self.options)


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Any:
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return numbers.to(dtype)


def _mask(generator: torch.Generator, rows: int, teachers: int, masked: bool) -> Any:
    mask = torch.rand(rows, teachers, generator=generator) > 0.3
    return mask if masked else None


def gaussian(
    generator: torch.Generator,
    rows: int,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    *,
    modes: int = 0,
    masked: bool = False,
    bound: float | None = None,
    per_dim: bool = True,
    full: bool = False,
) -> Arguments:
    """Arguments of gaussian_nll; modes=0 has no mode logits."""
    width, inner = sum(dims), (modes,) if modes else ()
    mean = _normal(generator, dtype, rows, *inner, width)
    log_std = _normal(generator, dtype, rows, *inner, width, scale=0.4)
    target = _normal(generator, dtype, rows, width)
    logits = _normal(generator, dtype, rows, modes, len(dims)) if modes else None
    mask = _mask(generator, rows, len(dims), masked)
    return mask, dims, mean, log_std, target, logits, bound, per_dim, full


def linear_gaussian(
    generator: torch.Generator,
    rows: int,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    *,
    features: int = 11,
    modes: int = 0,
    bias: bool = True,
    masked: bool = False,
    bound: float | None = 1.0,
    workspace: int = 1 << 20,
    stash: bool = False,
    own: bool = False,
) -> Arguments:
    """Arguments of linear_gaussian_nll; modes=0 has no mode weights; own inputs or a shared one."""
    width, inner = sum(dims), (modes,) if modes else ()
    input = _normal(generator, dtype, *(len(dims),) * own, rows, features)
    weight = _normal(generator, dtype, 2, *inner, width, features, scale=0.2)
    offset = _normal(generator, dtype, 2, *inner, width, scale=0.2) if bias else None
    mode_weight = _normal(generator, dtype, modes, len(dims), features) if modes else None
    mode_bias = _normal(generator, dtype, modes, len(dims)) if modes and bias else None
    target = _normal(generator, dtype, rows, width)
    mask = _mask(generator, rows, len(dims), masked)
    layers = (input, weight, offset, mode_weight, mode_bias, target)
    return mask, dims, *layers, bound, True, False, workspace, stash


def _alignment_settings(
    generator: torch.Generator,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    *,
    cosine: float = 0.5,
    smooth_l1: float = 0.5,
    mse: float = 0.25,
    angle: float = 0.0,
    beta: float = 1.0,
    standard: bool = False,
) -> Arguments:
    """From shift to eps; `standard` gives a shift, a scale and a dispersion."""
    width, parts = sum(dims), (None, None, None)
    if standard:
        shift = _normal(generator, dtype, width, scale=0.3)
        scale, dispersion = (
            (0.5 + torch.rand(n, generator=generator, dtype=torch.float64)).to(dtype)
            for n in (width, len(dims))
        )
        parts = (shift, scale, dispersion)
    return *parts, cosine, smooth_l1, mse, angle, beta, 1e-8


def alignment(
    generator: torch.Generator,
    rows: int,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    *,
    masked: bool = False,
    **settings: Any,
) -> Arguments:
    """Arguments of alignment."""
    student, target = (_normal(generator, dtype, rows, sum(dims)) for _ in range(2))
    mask = _mask(generator, rows, len(dims), masked)
    return mask, dims, student, target, *_alignment_settings(generator, dims, dtype, **settings)


def linear_alignment(
    generator: torch.Generator,
    rows: int,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    *,
    features: int = 11,
    bias: bool = True,
    masked: bool = False,
    workspace: int = 1 << 20,
    stash: bool = False,
    own: bool = False,
    **settings: Any,
) -> Arguments:
    """Arguments of linear_alignment; own inputs or a shared one."""
    input = _normal(generator, dtype, *(len(dims),) * own, rows, features)
    weight = _normal(generator, dtype, sum(dims), features, scale=0.3)
    offset = _normal(generator, dtype, sum(dims), scale=0.3) if bias else None
    target = _normal(generator, dtype, rows, sum(dims))
    mask = _mask(generator, rows, len(dims), masked)
    rest = _alignment_settings(generator, dims, dtype, **settings)
    return mask, dims, input, weight, offset, target, *rest, workspace, stash


def votes(
    generator: torch.Generator,
    rows: int,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    *,
    teachers: int = 0,
    hard: bool = True,
    masked: bool = False,
    temperature: float = 1.0,
    sequence: bool = False,
) -> Arguments:
    """Arguments of majority_vote: a column a teacher, or with `teachers` a single one of them."""
    count = teachers or len(dims)
    student = _normal(generator, dtype, rows, dims[0])
    teacher = _normal(generator, dtype, rows, count, dims[0], scale=2.0)
    mask = _mask(generator, rows, count, masked)
    weight = None
    if teachers:  # small integers: votes are often tied
        weight = torch.randint(1, 4, (rows, count), generator=generator).to(dtype)
        weight = weight if mask is None else weight.masked_fill(~mask, 0.0)
        mask = None if mask is None else mask.any(-1, keepdim=True)
    tensors = list(teacher.unbind(1)) if sequence else [teacher]
    return mask, dims, student, tensors, weight, temperature, hard


def mixture(
    generator: torch.Generator,
    rows: int,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    *,
    teachers: int,
    concentration: float = 0.0,
    masked: bool = False,
    temperature: float = 1.0,
    sequence: bool = False,
) -> Arguments:
    """Arguments of mixture_kl, or with a concentration of dirichlet_mixture; one column."""
    student = _normal(generator, dtype, rows, *dims)
    teacher = _normal(generator, dtype, rows, teachers, *dims, scale=2.0)
    weight = (0.2 + torch.rand(rows, teachers, generator=generator)).to(dtype)
    counted = _mask(generator, rows, teachers, masked)
    mask = None if counted is None else counted.any(-1, keepdim=True)
    tensors = list(teacher.unbind(1)) if sequence else [teacher]
    common = mask, dims, student, tensors, weight, counted
    if not concentration:
        return *common, temperature, 2.5
    spread = 0.5 + torch.rand(rows, teachers, generator=generator, dtype=torch.float64)
    return *common, (concentration * spread).to(dtype)


WEIGHTS = {  # of KL(teacher || student) and of KL(student || teacher), and whether they mix
    "forward": (1.0, 0.0, False),
    "reverse": (0.0, 1.0, False),
    "jeffreys": (1.0, 1.0, False),
    "js": (0.3, 0.7, True),
}


def kl_div(
    generator: torch.Generator,
    rows: int,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    *,
    divergence: str = "forward",
    shared: bool = False,
    masked: bool = False,
    temperature: float = 1.0,
) -> Arguments:
    """Arguments of kl_div; a student of its own for each teacher, or one for all."""
    width = dims[0] if shared else sum(dims)
    student, teacher = (_normal(generator, dtype, rows, n) for n in (width, sum(dims)))
    mask = _mask(generator, rows, len(dims), masked)
    return mask, dims, student, teacher, *WEIGHTS[divergence], temperature, temperature**2


def linear_kl_div(
    generator: torch.Generator,
    rows: int,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    *,
    features: int = 11,
    bias: bool = True,
    masked: bool = False,
    workspace: int = 1 << 20,
    stash: bool = False,
    own: bool = False,
    layers: bool = False,
    divergence: str = "forward",
    temperature: float = 1.0,
) -> Arguments:
    """Arguments of linear_kl_div; own inputs or a shared one, teachers' logits or their layers."""
    input = _normal(generator, dtype, *(len(dims),) * own, rows, features)
    weight = _normal(generator, dtype, sum(dims), features, scale=0.3)
    offset = _normal(generator, dtype, sum(dims), scale=0.3) if bias else None
    if layers:
        widths = [5 + teacher for teacher in range(len(dims))]
        stored = [_normal(generator, dtype, rows, width) for width in widths]
        pairs = list(zip(dims, widths, strict=True))
        heads = [_normal(generator, dtype, *pair, scale=0.3) for pair in pairs]
        biases = [_normal(generator, dtype, n) if n % 2 else None for n in dims]
        teacher = (None, stored, heads, biases)
    else:
        teacher = (_normal(generator, dtype, rows, sum(dims)), [], [], [])
    mask = _mask(generator, rows, len(dims), masked)
    settings = (*WEIGHTS[divergence], temperature, temperature**2)
    return mask, dims, input, weight, offset, *teacher, *settings, workspace, stash


def operators_of(function: Callable[..., Any]) -> Loss:
    """The operators under a public loss, whose import registers drivers as well as kernels."""
    loss: Loss = getattr(ops, function.__name__)
    return loss


G, L = operators_of(F.gaussian_nll), operators_of(F.linear_gaussian_nll)
# A posterior's relative error is the absolute error of its energies: the roundings, 2^-24 of 1500
# terms of size ~ 1, add up at random to 2^-24 sqrt(1500) = 2e-6, those of partial sums to as much.
POSTERIOR = 6
SUMS = 5  # in the gradient to an input, one row's sum of 5000 terms that cancel
ALL_CASES = (
    Case("gaussian-tiny", G, gaussian, TINY, 5),
    Case("gaussian-ragged", G, gaussian, RAGGED, 37, {"masked": True, "full": True}),
    Case("gaussian-bound", G, gaussian, RAGGED, 9, {"bound": 1.5, "per_dim": False}),
    Case("gaussian-many", G, gaussian, MANY, 33, {"masked": True, "bound": 1.0}),
    Case("gaussian-one", G, gaussian, (5000,), 1),
    Case("gaussian-large", G, gaussian, RAGGED, 701, {"masked": True}, large=True),
    Case("mixture-tiny", G, gaussian, TINY, 5, {"modes": 3, "full": True}),
    Case(
        "mixture-ragged",
        G,
        gaussian,
        RAGGED,
        7,
        {"modes": 2, "masked": True},
        float32_factor=POSTERIOR,
    ),
    Case(
        "mixture-large",
        G,
        gaussian,
        (1201, 1, 600),
        331,
        {"modes": 2},
        large=True,
        float32_factor=POSTERIOR,
    ),
    Case("mixture-single", G, gaussian, (4, 6), 8, {"modes": 1, "bound": 2.0}),
    Case("linear-tiny", L, linear_gaussian, TINY, 5),
    Case(
        "linear-stash",
        L,
        linear_gaussian,
        TINY,
        6,
        {"modes": 2, "masked": True, "stash": True},
        float32_factor=2,  # rows of opposite sign add up in the modes' gradient
    ),
    Case("linear-one", L, linear_gaussian, (2500,), 1, {"stash": True}, float32_factor=SUMS),
    Case("linear-ragged", L, linear_gaussian, RAGGED, 30, {"masked": True, "workspace": 100_000}),
    Case(
        "linear-rows",
        L,
        linear_gaussian,
        (30, 70),
        4500,
        {"bias": False, "workspace": 3 << 20},
        large=True,
    ),
    # widths that Triton's GEMM with the loss in its epilogue takes, in 16 bits
    Case(
        "linear-blocks", L, linear_gaussian, (96, 16, 64, 48), 70, {"masked": True, "features": 48}
    ),
    Case(
        "linear-equal",
        L,
        linear_gaussian,
        (64,) * 3,
        40,
        {"bias": False, "stash": True, "features": 16},
    ),
    Case("linear-parts", L, linear_gaussian, (256, 128), 33, {"features": 32}),
    Case(
        "linear-gemm",  # above a GPU's blocks of 128 x 128 x 64
        L,
        linear_gaussian,
        (256, 144),
        300,
        {"features": 192, "masked": True},
        large=True,
    ),
    Case("linear-block", L, linear_gaussian, (32,) * 5, 33, {"workspace": 9000, "features": 80}),
    Case("linear-own", L, linear_gaussian, (40,) * 3, 50, {"own": True, "workspace": 8000}),
    Case("linear-own-stash", L, linear_gaussian, (3,) * 4, 6, {"own": True, "stash": True}),
    Case("linear-own-mixture", L, linear_gaussian, (5,) * 3, 9, {"own": True, "modes": 2}),
    Case("linear-mixture", L, linear_gaussian, (40, 9, 2), 35, {"modes": 3, "workspace": 24_000}),
)
A, LA = operators_of(F.alignment), operators_of(F.linear_alignment)
COSINE, ANGLE = (
    {"cosine": 0.0, "smooth_l1": 0.0, "mse": 0.0, name: 1.0} for name in ("cosine", "angle")
)
ALIGNMENT_CASES = (
    Case("alignment-tiny", A, alignment, TINY, 5, {"standard": True}),
    Case("alignment-ragged", A, alignment, RAGGED, 11, {"masked": True, "beta": 0.3}),
    Case("alignment-errors", A, alignment, RAGGED, 5, {"cosine": 0.0, "standard": True}),
    Case("alignment-cosine", A, alignment, RAGGED, 5, {**COSINE, "masked": True}),
    Case("alignment-angle", A, alignment, (3, 1500, 40), 9, {**ANGLE, "standard": True}),
    Case("alignment-l1", A, alignment, TINY, 6, {"beta": 0.0, "angle": 0.2}),
    Case("alignment-many", A, alignment, MANY, 9, {"masked": True, "standard": True}),
    Case("alignment-one", A, alignment, (5000,), 1),
    Case("alignment-large", A, alignment, RAGGED, 701, {"masked": True}, large=True),
    Case("linear-alignment-tiny", LA, linear_alignment, TINY, 5, {"standard": True}),
    Case("linear-alignment-stash", LA, linear_alignment, (4, 70), 9, {"stash": True, **ANGLE}),
    Case(
        "linear-alignment-ragged",
        LA,
        linear_alignment,
        RAGGED,
        30,
        {"masked": True, "standard": True, "workspace": 50_000},
    ),
    Case("linear-alignment-own", LA, linear_alignment, (40,) * 3, 50, {"own": True, "bias": False}),
)
V = operators_of(F.majority_vote)
SOFT = {"hard": False, "temperature": 2.5}
VOTES_CASES = (
    Case("votes-tiny", V, votes, (3,) * 3, 5),
    Case("votes-soft-tiny", V, votes, (4,) * 2, 6, {**SOFT, "sequence": True}),
    Case("votes-plurality-tiny", V, votes, (5,), 6, {"teachers": 4, "masked": True}),
    Case("votes-mean-tiny", V, votes, (5,), 6, {"teachers": 3, **SOFT}),
    Case("votes-each", V, votes, (1500,) * 5, 9, {"masked": True}),
    Case("votes-soft", V, votes, (1500,) * 5, 9, {"masked": True, **SOFT}),
    Case("votes-plurality", V, votes, (1500,), 5, {"teachers": 20}),
    Case("votes-mean", V, votes, (1500,), 9, {"teachers": 5, "masked": True, **SOFT}),
    Case("votes-many", V, votes, (17,) * len(MANY), 6, {"masked": True, "sequence": True}),
    Case("votes-many-soft", V, votes, (17,) * len(MANY), 5, {"hard": False}),
    Case("votes-few", V, votes, (3,), 12, {"teachers": 11, "sequence": True}),
    Case("votes-one", V, votes, (5000,), 1),
    # more classes than a GPU's block
    Case("votes-wide", V, votes, (4500,) * 3, 3, {"masked": True, "sequence": True}),
    Case("votes-wide-soft", V, votes, (4500,) * 2, 3, SOFT),
    Case("votes-wide-plurality", V, votes, (4500,), 4, {"teachers": 4, "masked": True}),
    Case("votes-wide-mean", V, votes, (4500,), 3, {"teachers": 3, **SOFT}),
    Case("votes-large", V, votes, (1500,) * 3, 801, SOFT, large=True),
)
K, D = operators_of(F.mixture_kl), operators_of(F.dirichlet_mixture)
MIXTURE_CASES = (
    Case("mixture-kl-tiny", K, mixture, (4,), 5, {"teachers": 3, "masked": True}),
    Case("mixture-kl-two-tiny", K, mixture, (4,), 5, {"teachers": 2, "sequence": True}),
    Case("mixture-kl-many", K, mixture, (17,), 33, {"teachers": 40, "masked": True}),
    Case("mixture-kl-wide", K, mixture, (1500,), 9, {"teachers": 7, "temperature": 2.5}),
    Case(
        "dirichlet-tiny",
        D,
        mixture,
        (4,),
        5,
        {"teachers": 3, "masked": True, "concentration": 5.0, "sequence": True},
    ),
    Case(
        "dirichlet-wide",
        D,
        mixture,
        (1500,),
        9,
        {"teachers": 7, "concentration": 2.0},
        float32_factor=POSTERIOR,
    ),
    Case(
        "dirichlet-many",
        D,
        mixture,
        (17,),
        33,
        {"teachers": 40, "masked": True, "concentration": 3.0},
    ),
)
KL, LKL = operators_of(F.kl_div), operators_of(F.linear_kl_div)
SEVERAL = 9 if INTERPRETED else 150  # teachers of few classes, more than fit a block
DIVERGENCE_CASES = (
    Case("kl-tiny", KL, kl_div, TINY, 5, {"temperature": 2.0}),
    Case("kl-tiny-reverse", KL, kl_div, TINY, 5, {"divergence": "reverse"}),
    Case("kl-tiny-jeffreys", KL, kl_div, TINY, 5, {"divergence": "jeffreys", "masked": True}),
    Case("kl-tiny-js", KL, kl_div, TINY, 5, {"divergence": "js", "temperature": 0.5}),
    Case("kl-tiny-shared", KL, kl_div, (3, 3), 5, {"divergence": "jeffreys", "shared": True}),
    Case("kl-ragged", KL, kl_div, RAGGED, 3, {"masked": True, "temperature": 0.7}),
    Case("kl-reverse", KL, kl_div, RAGGED, 2, {"divergence": "reverse"}),
    Case("kl-jeffreys", KL, kl_div, (3, 2500, 40), 2, {"divergence": "jeffreys"}),
    Case("kl-js", KL, kl_div, RAGGED, 2, {"divergence": "js", "masked": True}),
    Case("kl-many", KL, kl_div, (16,) * SEVERAL, 5, {"masked": True, "divergence": "jeffreys"}),
    Case("kl-pairs", KL, kl_div, (2,) * SEVERAL, 5, {"divergence": "js"}),
    Case("kl-one", KL, kl_div, (5000,), 1),
    Case("kl-large", KL, kl_div, RAGGED, 701, {"masked": True}, large=True),
    Case("kl-shared", KL, kl_div, (1300,) * 3, 2, {"shared": True, "masked": True}),
    Case("kl-shared-js", KL, kl_div, (2500,) * 2, 2, {"shared": True, "divergence": "js"}),
    Case("kl-shared-many", KL, kl_div, (7,) * SEVERAL, 5, {"shared": True, "masked": True}),
    Case("linear-kl-tiny", LKL, linear_kl_div, TINY, 5, {"divergence": "jeffreys"}),
    Case("linear-kl-stash", LKL, linear_kl_div, (4, 70), 9, {"stash": True, "divergence": "js"}),
    Case("linear-kl-layers", LKL, linear_kl_div, TINY, 6, {"layers": True, "masked": True}),
    Case(
        "linear-kl-ragged",
        LKL,
        linear_kl_div,
        RAGGED,
        6,
        {"masked": True, "temperature": 2.0, "workspace": 12_000, "layers": True},
    ),
    Case("linear-kl-own", LKL, linear_kl_div, (40,) * 3, 20, {"own": True, "bias": False}),
)
ALL_CASES = (*ALL_CASES, *ALIGNMENT_CASES, *VOTES_CASES, *MIXTURE_CASES, *DIVERGENCE_CASES)
CASES = tuple(case for case in ALL_CASES if not (case.large and INTERPRETED))
TINY_CASES = tuple(case for case in CASES if sum(case.dims) <= 10)
