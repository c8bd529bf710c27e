"""Cases of Gaussian likelihoods."""

import torch

import mtkd.functional as F

from .case import MANY, POSTERIOR, RAGGED, TINY, Arguments, Case, normal, operators_of, some_mask


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
    mean = normal(generator, dtype, rows, *inner, width)
    log_std = normal(generator, dtype, rows, *inner, width, scale=0.4)
    target = normal(generator, dtype, rows, width)
    logits = normal(generator, dtype, rows, modes, len(dims)) if modes else None
    mask = some_mask(generator, rows, len(dims), masked)
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
    input = normal(generator, dtype, *(len(dims),) * own, rows, features)
    weight = normal(generator, dtype, 2, *inner, width, features, scale=0.2)
    offset = normal(generator, dtype, 2, *inner, width, scale=0.2) if bias else None
    mode_weight = normal(generator, dtype, modes, len(dims), features) if modes else None
    mode_bias = normal(generator, dtype, modes, len(dims)) if modes and bias else None
    target = normal(generator, dtype, rows, width)
    mask = some_mask(generator, rows, len(dims), masked)
    layers = (input, weight, offset, mode_weight, mode_bias, target)
    return mask, dims, *layers, bound, True, False, workspace, stash


G, L = operators_of(F.gaussian_nll), operators_of(F.linear_gaussian_nll)
SUMS = 5  # in the gradient to an input, one row's sum of 5000 terms that cancel
GAUSSIAN_CASES = (
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
