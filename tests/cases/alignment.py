"""Cases of alignment."""

from typing import Any

import torch

import mtkd.functional as F

from .case import MANY, RAGGED, TINY, Arguments, Case, normal, operators_of, some_mask


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
        shift = normal(generator, dtype, width, scale=0.3)
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
    student, target = (normal(generator, dtype, rows, sum(dims)) for _ in range(2))
    mask = some_mask(generator, rows, len(dims), masked)
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
    input = normal(generator, dtype, *(len(dims),) * own, rows, features)
    weight = normal(generator, dtype, sum(dims), features, scale=0.3)
    offset = normal(generator, dtype, sum(dims), scale=0.3) if bias else None
    target = normal(generator, dtype, rows, sum(dims))
    mask = some_mask(generator, rows, len(dims), masked)
    rest = _alignment_settings(generator, dims, dtype, **settings)
    return mask, dims, input, weight, offset, target, *rest, workspace, stash


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
