"""The quadratic programme of gradient weights: the shortest vector of a hull, on the device.

``min w^T G w / 2`` over ``sum w = 1, 0 <= w <= cap``, by a primal-dual interior-point method with
Mehrotra's predictor and corrector. With z and u the multipliers of the two bounds and s = cap - w::

    G w - y - z + u = 0      sum w = 1      w z = mu      s u = mu

each step solves linear systems with the one matrix G + z / w + u / s. A fixed number of steps in
float64, frozen once the duality gap is small enough: the host never asks whether it is. A batch of
problems is solved at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 25
SMALL_ENOUGH = 1e-13  # of the duality gap, in units of G's mean diagonal
CENTRED = 0.3  # the part of mu that a step without the corrector aims at
NEAR = 0.995  # how far of the way to a bound a step may go


@torch.library.custom_op("mtkd::capped_simplex_qp", mutates_args=())  # one node when compiled
def capped_simplex_qp(gram: Tensor, present: Tensor, cap: Tensor) -> Tensor:
    """Return the minimisers ``(B, T)`` for Gram matrices ``(B, T, T)``, all float64.

    Where present ``(B, T)`` is False the weight is 0; a row's cap ``(B, 1)`` is above 1 / (its
    number of present teachers).
    """
    return solve(gram, present, cap)


@capped_simplex_qp.register_fake
def _(gram: Tensor, present: Tensor, cap: Tensor) -> Tensor:
    return gram.new_empty(present.shape)


class State(NamedTuple):
    """Weights and the multipliers of their two bounds, or a direction of these."""

    w: Tensor
    z: Tensor
    u: Tensor


def solve(gram: Tensor, present: Tensor, cap: Tensor) -> Tensor:
    """Return what `capped_simplex_qp` does, in plain operations."""
    here = present.to(gram.dtype)
    number = here.sum(-1, keepdim=True).clamp(min=1.0)
    gram = gram.masked_fill(~(present.unsqueeze(-1) & present.unsqueeze(-2)), 0.0)
    scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) / number
    gram = gram / scale.masked_fill(scale == 0, 1.0).unsqueeze(-1)
    state = State(here / number, here, here)
    for _ in range(STEPS):
        state = _step(_Newton(gram, here, cap, state), number)
    w = state.w.clamp(min=0.0).minimum(cap)
    total = w.sum(-1, keepdim=True)
    return w / total.masked_fill(total == 0, 1.0)


class _Newton:
    """Newton's equations at a state; absent teachers keep 0 in all directions."""

    def __init__(self, gram: Tensor, here: Tensor, cap: Tensor, state: State) -> None:
        self.state, self.here = state, here
        absent = 1.0 - here
        self.inside, self.room = state.w + absent, (cap - state.w) * here + absent
        self.gap = (state.w * state.z + self.room * state.u).sum(-1, keepdim=True)
        self.dual = (gram @ state.w.unsqueeze(-1)).squeeze(-1) - state.z + state.u
        diagonal = state.z / self.inside + state.u / self.room + absent
        self.factor, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed(diagonal))
        self.unit = self._solve(here)
        total = self.unit.sum(-1, keepdim=True)
        self.total = total.masked_fill(total == 0, 1.0)

    def _solve(self, right: Tensor) -> Tensor:
        return torch.cholesky_solve(right.unsqueeze(-1), self.factor).squeeze(-1)

    def direction(self, to_z: Tensor, to_u: Tensor) -> State:
        """Return where w z and s u change by the given amounts, to first order."""
        w, z, u = self.state
        free = self._solve((to_z / self.inside - to_u / self.room - self.dual) * self.here)
        missing = 1.0 - w.sum(-1, keepdim=True) - free.sum(-1, keepdim=True)
        dw = (free + missing / self.total * self.unit) * self.here
        to = (to_z - z * dw) / self.inside, (to_u + u * dw) / self.room
        return State(dw, to[0] * self.here, to[1] * self.here)

    def length(self, to: State) -> Tensor:
        """Return how far to go, a little less than to the next bound and at most 1."""
        now = torch.cat((self.inside, self.room, self.state.z, self.state.u), -1)
        change = torch.cat((to.w, -to.w, to.z, to.u), -1)
        ratio = torch.where(change < 0, -now / torch.where(change < 0, change, -1.0), torch.inf)
        return ratio.amin(-1, keepdim=True).mul(NEAR).clamp(max=1.0)

    def gap_after(self, to: State) -> Tensor:
        """Return the duality gap at the end of a step."""
        (w, z, u), length = self.state, self.length(to)
        lower = (w + length * to.w) * (z + length * to.z)
        upper = (self.room - length * to.w) * (u + length * to.u)
        return (lower + upper).sum(-1, keepdim=True)


def _step(newton: _Newton, number: Tensor) -> State:
    (w, z, u), gap = newton.state, newton.gap
    lower, upper, mu = w * z, newton.room * u, gap / (2.0 * number)
    plain = newton.direction(-lower, -upper)
    left = (newton.gap_after(plain) / gap.clamp(min=SMALL_ENOUGH)).clamp(0.0, 1.0)
    aim = left.pow(3) * mu
    bent = newton.direction(aim - lower - plain.w * plain.z, aim - upper + plain.w * plain.u)
    straight = newton.direction(CENTRED * mu - lower, CENTRED * mu - upper)
    circles = newton.gap_after(bent) > CENTRED * gap  # the corrector alone may run in them
    to = State(*(torch.where(circles, s, b) for s, b in zip(straight, bent, strict=True)))
    length = newton.length(to)
    # near the optimum the system is nearly singular: its solution may not be finite any more
    go_on = torch.cat(to, -1).isfinite().all(-1, keepdim=True) & (gap > SMALL_ENOUGH)
    pairs = zip(newton.state, to, strict=True)
    return State(*(torch.where(go_on, now + length * change, now) for now, change in pairs))
