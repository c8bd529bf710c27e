"""The quadratic programme of gradient weights: the shortest vector of a hull, on the device.

``min w^T G w / 2`` over ``sum w = 1, 0 <= w <= cap``, by a primal-dual interior-point method with
Mehrotra's predictor and corrector. With z and u the multipliers of the two bounds and s = cap - w::

    G w - y - z + u = 0      sum w = 1      w z = mu      s u = mu

each step solves linear systems with the one matrix G + z / w + u / s. A fixed number of steps in
float64, frozen once the duality gap is small enough: the host never asks whether it is. A batch of
problems is solved at once.
"""

import torch
from torch import Tensor

STEPS = 25
SMALL_ENOUGH = 1e-13  # of the duality gap, in units of G's mean diagonal
NEAR = 0.995  # how far of the way to a bound a step may go


@torch.library.custom_op("mtkd::capped_simplex_qp", mutates_args=())  # one node when compiled
def capped_simplex_qp(gram: Tensor, present: Tensor, cap: Tensor) -> Tensor:
    """Return the minimisers ``(B, T)`` for Gram matrices ``(B, T, T)``.

    Where present ``(B, T)`` is False the weight is 0; a row's cap ``(B, 1)`` is above 1 / (its
    number of present teachers).
    """
    return solve(gram, present, cap)


@capped_simplex_qp.register_fake
def _(gram: Tensor, present: Tensor, cap: Tensor) -> Tensor:
    return gram.new_empty(present.shape)


def solve(gram: Tensor, present: Tensor, cap: Tensor) -> Tensor:
    """Return what `capped_simplex_qp` does; the caller gives float64."""
    here = present.to(gram.dtype)
    number = here.sum(-1, keepdim=True).clamp(min=1.0)
    both = here.unsqueeze(-1) * here.unsqueeze(-2)
    gram = (gram * both).masked_fill(both == 0, 0.0)
    scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) / number
    gram = gram / scale.masked_fill(scale == 0, 1.0).unsqueeze(-1)
    w = here / number
    z, u = here.clone(), here.clone()
    for _ in range(STEPS):
        w, z, u = _step(gram, here, number, cap, (w, z, u))
    w = w.clamp(min=0.0).minimum(cap)
    total = w.sum(-1, keepdim=True)
    return w / total.masked_fill(total == 0, 1.0)


State = tuple[Tensor, Tensor, Tensor]


def _step(gram: Tensor, here: Tensor, number: Tensor, cap: Tensor, state: State) -> State:
    """Return weights and multipliers after one step; absent teachers keep 0 in all of them."""
    w, z, u = state
    absent = 1.0 - here
    room = (cap - w) * here + absent
    inside = w + absent
    gap = (w * z + room * u).sum(-1, keepdim=True)
    mu = gap / (2.0 * number)
    dual = (gram @ w.unsqueeze(-1)).squeeze(-1) - z + u
    system = gram + torch.diag_embed(z / inside + u / room + absent)
    factor, _ = torch.linalg.cholesky_ex(system)
    unit = torch.cholesky_solve(here.unsqueeze(-1), factor).squeeze(-1)
    total = unit.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)

    def direction(to_z: Tensor, to_u: Tensor) -> State:
        right = (-dual + to_z / inside - to_u / room) * here
        free = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
        multiplier = (1.0 - w.sum(-1, keepdim=True) - free.sum(-1, keepdim=True)) / total
        dw = (free + multiplier * unit) * here
        return dw, (to_z - z * dw) / inside * here, (to_u + u * dw) / room * here

    def length(dw: Tensor, dz: Tensor, du: Tensor) -> Tensor:
        now, change = torch.cat((inside, room, z, u), -1), torch.cat((dw, -dw, dz, du), -1)
        ratio = torch.where(change < 0, -now / torch.where(change < 0, change, -1.0), torch.inf)
        return ratio.amin(-1, keepdim=True).mul(NEAR).clamp(max=1.0)

    dw, dz, du = direction(-w * z, -room * u * here)
    alpha = length(dw, dz, du)
    reached = (w + alpha * dw) * (z + alpha * dz) + (room - alpha * dw) * (u + alpha * du)
    centre = (reached.sum(-1, keepdim=True) / gap.clamp(min=SMALL_ENOUGH)).clamp(0.0, 1.0).pow(
        3
    ) * mu
    dw, dz, du = direction(centre - w * z - dw * dz, centre - room * u + dw * du)
    alpha = length(dw, dz, du)
    # at the optimum the system is nearly singular: its solution may not be finite any more
    finite = (dw.isfinite() & dz.isfinite() & du.isfinite()).all(-1, keepdim=True)
    go_on = finite & (gap > SMALL_ENOUGH)
    return (
        torch.where(go_on, w + alpha * dw, w),
        torch.where(go_on, z + alpha * dz, z),
        torch.where(go_on, u + alpha * du, u),
    )
