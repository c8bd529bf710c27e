"""Cases of votes."""

import torch

import mtkd.functional as F

from .case import MANY, Arguments, Case, normal, operators_of, some_mask


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
    student = normal(generator, dtype, rows, dims[0])
    teacher = normal(generator, dtype, rows, count, dims[0], scale=2.0)
    mask = some_mask(generator, rows, count, masked)
    weight = None
    if teachers:  # small integers: votes are often tied
        weight = torch.randint(1, 4, (rows, count), generator=generator).to(dtype)
        weight = weight if mask is None else weight.masked_fill(~mask, 0.0)
        mask = None if mask is None else mask.any(-1, keepdim=True)
    tensors = list(teacher.unbind(1)) if sequence else [teacher]
    return mask, dims, student, tensors, weight, temperature, hard


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
    Case("votes-few", V, votes, (3,), 7, {"teachers": 11, "sequence": True}),
    Case("votes-one", V, votes, (5000,), 1),
    # more classes than a GPU's block
    Case("votes-wide", V, votes, (4500,) * 3, 2, {"masked": True, "sequence": True}),
    Case("votes-wide-soft", V, votes, (4500,) * 2, 2, SOFT),
    Case("votes-wide-plurality", V, votes, (4500,), 2, {"teachers": 3, "masked": True}),
    Case("votes-wide-mean", V, votes, (4500,), 2, {"teachers": 2, **SOFT}),
    Case("votes-large", V, votes, (1500,) * 3, 801, SOFT, large=True),
)
