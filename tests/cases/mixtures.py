"""Cases of mixtures."""

import torch

import mtkd.functional as F

from .case import POSTERIOR, Arguments, Case, normal, operators_of, some_mask


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
    student = normal(generator, dtype, rows, *dims)
    teacher = normal(generator, dtype, rows, teachers, *dims, scale=2.0)
    weight = (0.2 + torch.rand(rows, teachers, generator=generator)).to(dtype)
    counted = some_mask(generator, rows, teachers, masked)
    mask = None if counted is None else counted.any(-1, keepdim=True)
    tensors = list(teacher.unbind(1)) if sequence else [teacher]
    common = mask, dims, student, tensors, weight, counted
    if not concentration:
        return *common, temperature, 2.5
    spread = 0.5 + torch.rand(rows, teachers, generator=generator, dtype=torch.float64)
    return *common, (concentration * spread).to(dtype)


K, D = operators_of(F.mixture_kl), operators_of(F.dirichlet_mixture)
MIXTURE_CASES = (
    Case("mixture-kl-tiny", K, mixture, (4,), 5, {"teachers": 3, "masked": True}),
    Case("mixture-kl-two-tiny", K, mixture, (4,), 5, {"teachers": 2, "sequence": True}),
    Case("mixture-kl-many", K, mixture, (17,), 33, {"teachers": 40, "masked": True}),
    Case("mixture-kl-wide", K, mixture, (1500,), 9, {"teachers": 7, "temperature": 2.5}),
    Case("mixture-kl-one", K, mixture, (5000,), 1, {"teachers": 2}),
    Case("mixture-kl-list", K, mixture, (1025,), 7, {"teachers": 5, "sequence": True}),
    # softmaxes of a row that are more than the kernel keeps
    Case("mixture-kl-far", K, mixture, (45000,), 2, {"teachers": 3, "temperature": 2.0}),
    Case("mixture-kl-large", K, mixture, (1500,), 701, {"teachers": 2, "masked": True}, large=True),
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
