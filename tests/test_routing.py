"""Top-k routing: the chosen, the gate's gradient, the balance; MST-Distill's traps."""

import math

import pytest
import torch
from synchronisation import NoSynchronisation

import mtkd.functional as F
from mtkd.reduction import reduce_matrix
from mtkd.testing import assert_close
from mtkd.weighting import top_k_routing

DOUBLE = torch.float64
NAN, INF = math.nan, math.inf
N, E, C = 9, 4, 6


def gate_logits(dtype=DOUBLE):
    torch.manual_seed(0)
    return torch.randn(N, E, dtype=DOUBLE).to(dtype).requires_grad_()


def some_masked():
    mask = torch.rand(N, E, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0], mask[1] = False, True
    mask[2] = torch.arange(E) == 1
    return mask


def by_loop(logits, k, mask, share):
    weights, gates = torch.zeros(2, *logits.shape, dtype=DOUBLE)
    for n in range(len(logits)):
        counted = [e for e in range(E) if mask is None or mask[n, e]]
        if not counted:
            continue
        gates[n, counted] = logits[n, counted].detach().softmax(-1)
        chosen = sorted(counted, key=lambda e: (-gates[n, e].item(), e))[:k]
        parts = gates[n, chosen] if share == "gate" else torch.ones(len(chosen), dtype=DOUBLE)
        weights[n, chosen] = parts / parts.sum()
    return weights, gates


@pytest.mark.parametrize("share", ["equal", "gate"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16], ids=str)
def test_against_the_definition(dtype, k, masked, share):
    logits, mask = gate_logits(dtype), some_masked() if masked else None
    routing = top_k_routing(logits, k, mask, share=share)
    weights, gates = by_loop(logits.double(), k, mask, share)
    wide = DOUBLE if dtype == DOUBLE else torch.float32
    for got, want in ((routing.weight, weights), (routing.probability, gates)):
        assert got.dtype == wide
        assert_close(got, want, wide)
    assert torch.equal(routing.weight > 0, weights > 0)


@pytest.mark.parametrize("share", ["equal", "gate"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_weights_gradient_is_that_of_the_gates_probabilities(masked, share):
    logits, mask = gate_logits(), some_masked() if masked else None
    upstream = torch.rand(N, E, dtype=DOUBLE)
    routing = top_k_routing(logits, 2, mask, share=share)
    (got,) = torch.autograd.grad(routing.weight, logits, upstream)
    with torch.no_grad():
        g = by_loop(logits, 2, mask, share)[1]
        want = g * (upstream - (g * upstream).sum(-1, keepdim=True))
    assert_close(got, want, DOUBLE)


def test_ties_choose_the_first():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    weight = top_k_routing(logits, 2).weight
    assert weight.tolist() == [[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0]]
    assert (top_k_routing(torch.zeros(300, 64), 5).weight[:, :5] > 0).all()


@pytest.mark.parametrize("share", ["equal", "gate"])
def test_masked_entries_take_no_part_whatever_they_hold(share):
    mask, results = some_masked(), []
    for fill in (0.0, NAN, INF, -INF):
        logits = gate_logits().detach().masked_fill(~mask, fill).requires_grad_()
        routing = top_k_routing(logits, 2, mask, share=share)
        total = routing.load_balance + (routing.weight * torch.arange(E)).sum()
        results.append((*routing, *torch.autograd.grad(total, logits)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    assert not results[0][0][0].any()
    assert not results[0][3][~mask].any()


def balance_by_loop(gates, mask):
    """KL of the mean of rows that are uniform over what counts, from the mean of the gate's."""
    rows = [n for n in range(len(gates)) if mask is None or mask[n].any()]
    counted = torch.ones(gates.shape) if mask is None else mask
    ideal = sum(counted[n].double() / counted[n].sum() for n in rows) / len(rows)
    mean = sum(gates[n] for n in rows) / len(rows)
    return sum(u * (u / m).log() for u, m in zip(ideal, mean, strict=True) if u > 0)


@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_is_the_divergence_and_is_divided_by_e_once(masked):
    logits, mask = gate_logits(), some_masked() if masked else None
    routing = top_k_routing(logits, 1, mask)
    want = balance_by_loop(routing.probability, mask)
    assert_close(routing.load_balance, want, DOUBLE)
    gradients = [
        torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (routing.load_balance, want)
    ]
    assert_close(*gradients, DOUBLE)
    if not masked:
        mean = routing.probability.mean(0)
        torchs = torch.nn.functional.kl_div(
            mean.log(), torch.full((E,), 1 / E, dtype=DOUBLE), reduction="sum"
        )
        assert_close(routing.load_balance, torchs, DOUBLE)


def test_a_balanced_gate_has_no_load_loss_though_each_row_is_sure():
    logits = 8 * torch.eye(E, dtype=DOUBLE).repeat(5, 1)
    logits.requires_grad_()
    balance = top_k_routing(logits, 1).load_balance
    assert balance.abs() < 1e-14
    assert torch.autograd.grad(balance, logits)[0].abs().max() < 1e-14
    available = torch.eye(E, dtype=torch.bool).repeat(5, 1)  # and where nothing can be chosen
    assert top_k_routing(logits, 1, available).load_balance.abs() < 1e-14


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.float16], ids=str)
def test_extremes_are_finite(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, -1e4]], dtype=dtype, requires_grad=True)
    for mask in (None, torch.tensor([[True, True, False], [True, True, False]])):
        routing = top_k_routing(logits, 2, mask)
        assert all(x.isfinite().all() for x in routing)
        assert routing.load_balance > 1e3  # a teacher that is never chosen: in log space
        total = routing.load_balance + routing.weight[0, 1]
        assert torch.autograd.grad(total, logits)[0].isfinite().all()


def test_empty_batches_and_single_teachers():
    for rows, mask in ((0, None), (0, torch.zeros(0, E).bool()), (3, torch.zeros(3, E).bool())):
        logits = torch.randn(rows, E, requires_grad=True)
        routing = top_k_routing(logits, 2, mask)
        assert not routing.weight.any()
        assert routing.load_balance == 0
        total = routing.load_balance + routing.weight.sum()
        assert not torch.autograd.grad(total, logits)[0].any()
    routing = top_k_routing(torch.randn(3, 1), 1)
    assert (routing.weight == 1).all()
    assert routing.load_balance == 0


def mst_distill(student, gate, teacher, loss, k=1):
    """MST-Distill's routed loss and load balance, of a student's and a gate's parameters."""
    features = torch.randn(N, 5, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    hidden = (features @ student).tanh()
    routing = top_k_routing(hidden.detach() @ gate, k)
    if loss == "mixture":
        return F.mixture_kl(hidden, teacher, routing.weight, temperature=4.0), routing
    each = [F.mixture_kl(hidden, [t], temperature=4.0, reduction="none") for t in teacher.unbind(1)]
    return reduce_matrix(torch.cat(each, -1), weight=routing.weight), routing


def parameters():
    torch.manual_seed(0)
    student = torch.randn(5, C, dtype=DOUBLE, requires_grad=True)
    gate = (0.1 * torch.randn(C, E, dtype=DOUBLE)).requires_grad_()
    return student, gate, 2 * torch.randn(N, E, C, dtype=DOUBLE)


@pytest.mark.parametrize("loss", ["mixture", "sum"])
def test_the_gate_gets_a_distillation_gradient(loss):
    student, gate, teacher = parameters()
    value, _ = mst_distill(student, gate, teacher, loss)
    to_student, to_gate = torch.autograd.grad(value, (student, gate))
    assert to_student.abs().max() > 1e-3
    assert to_gate.abs().max() > 1e-3


def test_k_of_one_is_the_chosen_teachers_own_loss_either_way():
    student, gate, teacher = parameters()
    values = [mst_distill(student, gate, teacher, loss)[0] for loss in ("mixture", "sum")]
    assert_close(*values, DOUBLE)


def test_load_balance_does_not_leak_into_the_student():
    student, gate, teacher = parameters()
    _, routing = mst_distill(student, gate, teacher, "sum")
    leaves = (student, gate)
    leak, to_gate = torch.autograd.grad(routing.load_balance, leaves, allow_unused=True)
    assert leak is None
    assert to_gate.abs().max() > 1e-6


@pytest.mark.parametrize("loss", ["mixture", "sum"])
def test_training_the_gate_finds_the_teacher_that_knows(loss):
    student, gate, teacher = parameters()
    with torch.no_grad():
        features = torch.randn(N, 5, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
        teacher[:, 2] = (features @ student).tanh()
    gate = torch.nn.Parameter(gate.detach())
    for _ in range(200):
        value, _ = mst_distill(student.detach(), gate, teacher, loss)
        (grad,) = torch.autograd.grad(value, gate)
        gate.data -= grad / grad.norm().clamp(min=1e-12) * 0.3
        if value < 1e-10:
            break
    assert value < 1e-10


def test_leading_dimensions_are_rows():
    logits = gate_logits()[:8]
    flat, grid = top_k_routing(logits, 2), top_k_routing(logits.reshape(2, 4, E), 2)
    assert grid.weight.shape == (2, 4, E)
    assert torch.equal(grid.weight.reshape(8, E), flat.weight)
    assert torch.equal(grid.load_balance, flat.load_balance)
    assert top_k_routing(logits[0], 2).weight.shape == (E,)


def test_gradcheck_of_load_balance():
    logits = gate_logits()
    for mask in (None, some_masked()):
        assert torch.autograd.gradcheck(lambda x, m=mask: top_k_routing(x, 2, m)[2], logits)


def test_the_host_never_waits():
    logits, mask = gate_logits(), some_masked()
    with NoSynchronisation():
        for share in ("equal", "gate"):
            routing = top_k_routing(logits, 2, mask, share=share)
            (routing.weight.square().sum() + routing.load_balance).backward()
    meta = top_k_routing(logits.to("meta"), 2, mask.to("meta"))
    assert meta.weight.shape == (N, E)


def test_compile_fullgraph():
    torch._dynamo.reset()
    student, gate, teacher = (x.detach().float() for x in parameters())
    hidden = (torch.randn(N, 5) @ student).requires_grad_()
    gate.requires_grad_()

    def loss(hidden, gate):
        routing = top_k_routing(hidden.detach() @ gate, 2)
        return F.mixture_kl(hidden, teacher, routing.weight) + 0.1 * routing.load_balance

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        value = run(hidden, gate)
        results.append((value, *torch.autograd.grad(value, (hidden, gate))))
    for want, got in zip(*results, strict=True):
        assert_close(got, want, torch.float32)


Z = torch.zeros


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], 1), {}, TypeError, "gate_logits: expected a tensor, got list"),
        ((Z(2, 3), 4), {}, ValueError, "k: expected a number of teachers from 1 to 3, got 4"),
        ((Z(2, 3), 0), {}, ValueError, "k: .*from 1 to 3, got 0"),
        ((Z(2, 3), 1.5), {}, TypeError, "k: expected an integer, got float"),
        ((Z(2, 3), True), {}, TypeError, "k: expected an integer, got True"),
        ((Z(2, 3), 1), {"share": "all"}, ValueError, "share: .*equal or gate, got 'all'"),
        ((Z(2, 3), 1, Z(2, 2).bool()), {}, ValueError, r"mask: expected shape \(2, 3\)"),
        ((Z(2, 0), 1), {}, ValueError, "gate_logits: .*at least one teacher"),
    ],
)
def test_one_clear_error(arguments, options, error, message):
    with pytest.raises(error, match=message) as raised:
        top_k_routing(*arguments, **options)
    assert "\n" not in str(raised.value)
