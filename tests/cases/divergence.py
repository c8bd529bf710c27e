"""Cases of divergences."""

import torch

import mtkd.functional as F

from .case import INTERPRETED, RAGGED, TINY, Arguments, Case, normal, operators_of, some_mask

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
    student, teacher = (normal(generator, dtype, rows, n) for n in (width, sum(dims)))
    mask = some_mask(generator, rows, len(dims), masked)
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
    input = normal(generator, dtype, *(len(dims),) * own, rows, features)
    weight = normal(generator, dtype, sum(dims), features, scale=0.3)
    offset = normal(generator, dtype, sum(dims), scale=0.3) if bias else None
    if layers:
        widths = [5 + teacher for teacher in range(len(dims))]
        stored = [normal(generator, dtype, rows, width) for width in widths]
        pairs = list(zip(dims, widths, strict=True))
        heads = [normal(generator, dtype, *pair, scale=0.3) for pair in pairs]
        biases = [normal(generator, dtype, n) if n % 2 else None for n in dims]
        teacher = (None, stored, heads, biases)
    else:
        teacher = (normal(generator, dtype, rows, sum(dims)), [], [], [])
    mask = some_mask(generator, rows, len(dims), masked)
    settings = (*WEIGHTS[divergence], temperature, temperature**2)
    return mask, dims, input, weight, offset, *teacher, *settings, workspace, stash


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
