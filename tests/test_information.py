"""The bound on the disagreement: where it holds, and where it does not."""

from math import acos, e, exp, log, pi

import pytest
import torch

import mtkd.functional as F
from mtkd.information import disagreement_bound
from mtkd.testing import assert_close


def entropy(p):
    """Of distributions along the last axis, in nats."""
    return -torch.special.xlogy(p, p).sum(-1)


@pytest.mark.parametrize("seed", range(20))
def test_discrete_teachers_obey_it(seed):
    generator = torch.Generator().manual_seed(seed)
    students, teachers, states, classes = 4, 3, 12, 5
    joint = torch.rand(teachers, students, states, generator=generator, dtype=torch.float64) ** 6
    p_student = torch.rand(students, generator=generator, dtype=torch.float64)
    p_student = p_student / p_student.sum()
    given = joint / joint.sum(-1, keepdim=True)  # P(T_t | S)
    decides = torch.randint(classes, (teachers, states), generator=generator)
    decided = torch.zeros(teachers, students, classes, dtype=torch.float64)
    for t in range(teachers):
        decided[t].index_add_(-1, decides[t], given[t])
    errors = ((1 - decided.amax(-1)) * p_student).sum(-1)  # of the best predictor of each
    entropies = (entropy(given) * p_student).sum(-1)
    of_decisions = (entropy(decided) * p_student).sum(-1)
    assert bool((errors <= 1 - torch.exp(-of_decisions) + 1e-12).all())
    assert bool((of_decisions <= entropies + 1e-12).all())
    assert errors.mean() <= disagreement_bound(of_decisions) + 1e-12
    assert errors.mean() <= disagreement_bound(entropies) + 1e-12


def gaussian_bound(rho):
    """Of teachers that are jointly Gaussian with the student, of variance 1."""
    return disagreement_bound(torch.tensor([0.5 * log(2 * pi * e * (1 - rho**2))])).item()


def test_gaussian_embeddings_and_thresholds_break_it():
    for rho in (0.0, 0.5, 0.9, 0.96, 0.9643):
        assert acos(rho) / pi < gaussian_bound(rho)
    for rho in (0.9645, 0.965, 0.97, 0.99):
        assert acos(rho) / pi > gaussian_bound(rho)
    assert gaussian_bound(0.99) < 0  # a density's entropy is negative there


def test_the_truth_for_thresholds_is_arccos():
    generator = torch.Generator().manual_seed(0)
    s, noise = torch.randn(2, 400_000, generator=generator).unbind()
    rho = 0.97
    t = rho * s + (1 - rho**2) ** 0.5 * noise
    logits = [torch.stack((-x, x), -1) for x in (s, t)]
    measured = F.disagreement(logits[0], logits[1].unsqueeze(1)).mean().item()
    assert measured == pytest.approx(acos(rho) / pi, abs=2e-3)
    assert measured > gaussian_bound(rho)


def test_it_takes_total_nats_of_the_likelihood():
    torch.manual_seed(0)
    mean, log_std, target = torch.randn(3, 6, 5, dtype=torch.float64).unbind()
    options = {"full": True, "per_dim": False, "reduction": "none"}
    nll = F.gaussian_nll(mean.requires_grad_(), log_std, target, (2, 3), **options)
    parts = torch.distributions.Normal(mean, log_std.exp()).log_prob(target).split((2, 3), -1)
    want = 1 - exp(sum(part.sum().item() for part in parts) / 12)
    bound = disagreement_bound(nll)
    assert_close(bound, torch.tensor(want, dtype=torch.float64), torch.float64)
    assert torch.autograd.grad(bound, mean)[0].any()


@pytest.mark.parametrize(
    ("nll", "error", "message"),
    [
        (1.0, TypeError, "nll: expected a tensor, got float"),
        (torch.tensor([1]), TypeError, "nll: .*torch.int64"),
        (torch.zeros(0, 3), ValueError, r"nll: expected at least one number, got shape \(0, 3\)"),
    ],
)
def test_one_clear_error(nll, error, message):
    with pytest.raises(error, match=message):
        disagreement_bound(nll)
