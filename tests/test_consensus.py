"""Consensus against loops written from its definition; ties, missing messages, extremes."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from cases import INTERPRETED
from torch.library import opcheck

import mtkd.functional as F
from benchmarks import consensus as consensus_benchmark
from benchmarks.measure import CpuClock
from mtkd import ops
from mtkd.reference import consensus as formulas
from mtkd.testing import assert_close, poisoned_memory

NAN, INF = float("nan"), float("inf")
DOUBLE = torch.float64
# the interpreter is slow: one network, and no more messages than the kernel takes
COUNTS = (1, 2, 13) if INTERPRETED else (1, 2, 3, 6, 13, 16, 17, 40)
FEW = (2, 13) if INTERPRETED else (1, 2, 13, 40)
SIZE = 133 if INTERPRETED else 333  # elements: more than a block, and not a multiple of it
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
METHODS = ("mean", "median", "trimmed_mean")
KERNELS = ("flat", "linear", "gaussian")
TRIM = 0.2
NEAR = 0.5301  # which no distance is


# NumPy, which interprets kernels, warns of what a GPU does silently
pytestmark = pytest.mark.filterwarnings(
    *(f"ignore:{what} encountered:RuntimeWarning" for what in ("invalid value", "overflow"))
)

# The definition, one element at a time


def quantiles(values, weights, trim):
    """The mean of the quantile function from trim to 1 - trim."""
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if w > 0 and not math.isnan(v)]
    total = sum(w for _, w in pairs)
    if not total:
        return NAN
    pairs.sort()
    if trim == 0.5:
        begin, lower, upper = 0.0, None, None
        for v, w in pairs:
            end = begin + w
            if lower is None and end >= (0.5 - 1e-6) * total:
                lower = v
            if upper is None and end > (0.5 + 1e-6) * total:
                upper = v
            begin = end
        return lower if lower == upper else (lower + upper) / 2
    begin, result = 0.0, 0.0
    for v, w in pairs:
        inside = min(begin + w, total - trim * total) - max(begin, trim * total)
        result += inside * v if inside > 0 else 0.0
        begin += w
    return result / (total * (1 - 2 * trim))


def similarity(distance, kernel, bandwidth, scaled):
    if math.isnan(distance):
        return 0.0
    if kernel == "gaussian":
        return math.exp(-(distance**2) / (2 * bandwidth**2))
    if distance > bandwidth:
        return 0.0
    return 1.0 if kernel == "flat" else 1 - distance / (1 if scaled else bandwidth)


def share(weights, chosen):
    total = sum(weights)
    return sum(w for w, c in zip(weights, chosen, strict=True) if c) / total if total else 0.0


def element(values, weights, trim, kernel, bandwidth, iterations, start=None, scale=None):
    """Consensus, confidence and shares of one element; scale is what low and high are over all."""
    used = [0.0 if math.isnan(v) else w for v, w in zip(values, weights, strict=True)]
    center = quantiles(values, used, trim) if start is None else start

    def distances(center):
        low, unit = scale or (0.0, 1.0)
        return [(0.0 if v == center else abs(v - center)) / unit - low / unit for v in values]

    for _ in range(iterations if kernel else 0):
        used = [
            w * similarity(d, kernel, bandwidth, scale)
            for w, d in zip(weights, distances(center), strict=True)
        ]
        if sum(used):
            center = quantiles(values, used, trim)
    confidence = share(weights, [d <= bandwidth for d in distances(center)])
    return center, confidence, [u / sum(used) if sum(used) else 0.0 for u in used]


def classes(columns, weights, trim, kernel, bandwidth, iterations):
    """Consensus and shares of one pixel: columns has the probabilities of each message."""
    used = [0.0 if any(map(math.isnan, c)) else w for c, w in zip(columns, weights, strict=True)]

    def vote(weights):
        voted = [quantiles(list(v), weights, trim) for v in zip(*columns, strict=True)]
        if sum(voted) < 1e-6:
            voted = [quantiles(list(v), weights, 0.0) for v in zip(*columns, strict=True)]
        return [v / sum(voted) for v in voted]

    center = vote(used)
    for _ in range(iterations if kernel else 0):
        far = [sum(abs(v - c) for v, c in zip(m, center, strict=True)) / 2 for m in columns]
        used = [
            w * similarity(d, kernel, bandwidth, None) for w, d in zip(weights, far, strict=True)
        ]
        if sum(used):
            center = vote(used)
    return center, [u / sum(used) if sum(used) else 0.0 for u in used]


def by_loop(messages, weights, method, kernel, bandwidth, iterations, start=None):
    """All elements of messages (P, N) with weights (P, N)."""
    trim = {"mean": 0.0, "median": 0.5, "trimmed_mean": TRIM}[method]
    columns = zip(messages.double().T.tolist(), weights.double().T.tolist(), strict=True)
    starts = [None] * messages.shape[1] if start is None else start.double().tolist()
    made = [
        element(v, w, trim, kernel, bandwidth, iterations, s)
        for (v, w), s in zip(columns, starts, strict=True)
    ]
    center, confidence, shares = zip(*made, strict=True)
    return (
        torch.tensor(center, dtype=DOUBLE),
        torch.tensor(confidence, dtype=DOUBLE),
        torch.tensor(shares, dtype=DOUBLE).T,
    )


def draw(count, *shape, seed=0, dtype=torch.float32, abstain=0.0):
    """Messages of multiples of 1/8, so that ties happen and distances are exact in all dtypes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-24, 25, (count, *shape), generator=generator) / 8
    x[torch.rand(x.shape, generator=generator) < abstain] = NAN
    return x.to(dtype)


def weights_of(count, *shape, seed=1):
    """Weights of multiples of 1/4, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, (count, *shape), generator=generator) / 4


def check(made, expected, dtype, shares=True):
    center, confidence, weights = made
    nowhere = expected[0].isnan()
    assert torch.equal(center.isnan(), nowhere)
    assert center.dtype == dtype
    assert_close(center.double().nan_to_num(), expected[0].nan_to_num(), dtype, factor=2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert confidence.dtype == weights.dtype == wide
    assert_close(confidence, expected[1], wide)
    if shares:
        assert_close(weights, expected[2], wide, factor=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("weighted", [None, "messages", "elements"])
def test_votes_are_the_definition(count, method, weighted, dtype):
    messages = draw(count, SIZE, dtype=dtype, abstain=0.1 if weighted == "elements" else 0.0)
    weight = {
        None: None,
        "messages": weights_of(count) + 0.25,
        "elements": weights_of(count, SIZE),
    }[weighted]
    with poisoned_memory():
        made = F.consensus(messages, method=method, weight=weight, bandwidth=NEAR, trim=TRIM)
    full = torch.ones(count) if weight is None else weight
    full = full.reshape(count, -1).expand(count, SIZE)
    check(made, by_loop(messages, full, method, None, NEAR, 0), dtype, shares=False)
    counted = (full if weighted == "elements" else full[:, 0]).sum(0) > 0
    torch.testing.assert_close(made.weights.sum(0), counted.to(made.weights.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "iterations"), list(product(KERNELS, (1, 3))))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", FEW)
def test_mean_shift_is_the_definition(count, method, kernel, iterations, dtype):
    # few steps, of numbers whose centers are exact, or a flat kernel's edge could decide otherwise
    if method != "median" and kernel != "gaussian":
        iterations = 1
    messages = draw(count, SIZE, dtype=dtype, abstain=0.1)
    start = messages[0].nan_to_num() if method != "median" else None
    weight = weights_of(count, SIZE) if kernel == "flat" else None
    bandwidth = 1.0301
    with poisoned_memory():
        made = F.consensus(
            messages,
            method=method,
            weight=weight,
            kernel=kernel,
            bandwidth=bandwidth,
            iterations=iterations,
            trim=TRIM,
            start=start,
        )
    full = torch.ones(count, SIZE) if weight is None else weight
    expected = by_loop(messages, full, method, kernel, bandwidth, iterations, start)
    if dtype == DOUBLE or method == "median":
        check(made, expected, dtype)
    else:
        assert_close(made.weights, expected[2], torch.float32, factor=4)
        assert_close(made.consensus.nan_to_num(), expected[0].nan_to_num(), dtype, factor=2)


@pytest.mark.parametrize("count", [1, 3, 13, 25])
def test_the_median_of_odd_counts_is_that_of_torch(count):
    messages = torch.randn(count, 4, 7, 33, generator=torch.Generator().manual_seed(count))
    made = F.consensus(messages, method="median").consensus
    assert torch.equal(made, messages.median(0).values)


@pytest.mark.parametrize("count", [2, 4, 12, 40])
def test_the_median_of_even_counts_is_the_middle(count):
    messages = draw(count, 500)
    middle = messages.double().quantile(0.5, 0)
    assert torch.equal(F.consensus(messages, method="median").consensus.double(), middle)
    equal = torch.full((count,), 0.1)  # sums of which are rounded
    weighted = F.consensus(messages, method="median", weight=equal)
    assert torch.equal(weighted.consensus.double(), middle)


def test_ties_and_cuts():
    vote = partial(F.consensus, torch.tensor([[1.0], [2.0], [4.0], [9.0]]))
    quarter = torch.tensor([0.25, 0.25, 0.5, 0.0])
    assert vote(method="median", weight=quarter).consensus.item() == 3.0
    assert vote(method="median", weight=torch.tensor([0.25, 0.25, 0.5, 0.1])).consensus.item() == 4
    assert vote(method="trimmed_mean", trim=0.25).consensus.item() == 3.0
    assert vote(method="trimmed_mean", trim=0.0).consensus.item() == 4.0
    half_in = vote(method="trimmed_mean", trim=0.125).consensus.item()
    assert half_in == pytest.approx((0.5 + 2 + 4 + 4.5) / 3)
    near = vote(method="trimmed_mean", trim=0.4999).consensus.item()
    assert near == pytest.approx(3.0, abs=1e-3)


LARGE = {"mean": 1e36, "trimmed_mean": 1e36, "median": 3e38}  # sums overflow as torch's do


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 13, 40])
def test_extremes(method, count):
    x = torch.zeros(count, 6)
    x[:, 0], x[:, 1], x[:, 2], x[0, 3], x[1, 3] = LARGE[method], INF, NAN, NAN, 5.0
    x[0, 4], x[0, 5] = -INF, 1e-38
    center, confidence, weights = F.consensus(x, method=method, bandwidth=1e30, trim=TRIM)
    expected, near, _ = by_loop(x, torch.ones_like(x), method, None, 1e30, 0)
    torch.testing.assert_close(center.double(), expected, rtol=1e-6, atol=1e-40, equal_nan=True)
    assert_close(confidence, near, torch.float32)
    assert confidence[2] == 0
    assert confidence[3] == pytest.approx((count - 1) / count)
    assert torch.equal(weights, torch.full((count,), 1 / count))


def test_who_weighs_nothing_has_no_vote():
    messages = torch.tensor([[1.0], [2.0], [3.0]])
    for bad in (0.0, -1.0, NAN):
        made = F.consensus(messages, method="median", weight=torch.tensor([1.0, bad, 1.0]))
        assert made.consensus.item() == 2.0  # the middle of 1 and 3
        assert made.weights.tolist() == [0.5, 0.0, 0.5]
        assert made.confidence.item() == 1.0
    nobody = F.consensus(messages, weight=torch.zeros(3))
    assert math.isnan(nobody.consensus.item())
    assert nobody.confidence.item() == 0.0
    assert nobody.weights.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kernel", ["flat", "linear"])
def test_where_no_message_is_in_reach_the_consensus_stays(kernel):
    messages = torch.tensor([[0.0, 0.0], [10.0, 1.0]])
    made = F.consensus(messages, kernel=kernel, bandwidth=2.0, iterations=3)
    assert made.consensus.tolist() == [5.0, 0.5]
    assert made.confidence.tolist() == [0.0, 1.0]
    assert made.weights.tolist() == [[0.0, 0.5], [0.0, 0.5]]


# Class maps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("count", "kernel"), [(1, None), (5, None), (13, "gaussian"), (40, "flat")]
)
@pytest.mark.parametrize("class_dim", [1, -1])
def test_class_maps_vote_with_probabilities(dtype, method, count, kernel, class_dim):
    generator = torch.Generator().manual_seed(count)
    logits = (2 * torch.randn(count, 3, 7, 5, 9, generator=generator)).to(dtype)
    weight = torch.rand(count, 3, 1, 9, generator=generator)
    logits[0, 0, 3, 2, 2] = NAN  # a class: the message abstains
    moved = logits.movedim(2, class_dim + 1 if class_dim > 0 else class_dim)
    bandwidth = 0.75 if kernel else None
    with poisoned_memory():
        center, confidence, shares = F.consensus(
            moved,
            method=method,
            class_dim=class_dim,
            weight=weight,
            kernel=kernel,
            bandwidth=bandwidth,
            trim=TRIM,
        )
    trim = {"mean": 0.0, "median": 0.5, "trimmed_mean": TRIM}[method]
    columns = logits.double().softmax(2).permute(1, 3, 4, 0, 2).reshape(-1, count, 7).tolist()
    full = weight.expand(count, 3, 5, 9).reshape(count, -1).double().T.tolist()
    made = [classes(c, w, trim, kernel, bandwidth, 1) for c, w in zip(columns, full, strict=True)]
    expected = torch.tensor([c for c, _ in made], dtype=DOUBLE).reshape(3, 5, 9, 7)
    found = center.movedim(class_dim, -1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert center.shape == moved.shape[1:]
    assert torch.equal(found.isnan(), expected.isnan())
    assert_close(found.nan_to_num(), expected.nan_to_num(), dtype, factor=3)
    assert_close(confidence, expected.nan_to_num().amax(-1), wide, factor=3)
    if kernel:
        expected_shares = torch.tensor([s for _, s in made], dtype=DOUBLE).T.reshape(shares.shape)
        assert_close(shares, expected_shares, wide, factor=8)


def test_class_maps_of_probabilities_and_of_extreme_logits():
    one_hot = torch.eye(3)[:, :, None]  # three messages, each for a class of its own
    for made in (
        F.consensus(one_hot, method="median", class_dim=0, logits=False),
        F.consensus(2e4 * one_hot - 1e4, method="median", class_dim=0),
        F.consensus(one_hot.log(), method="median", class_dim=0),
    ):
        torch.testing.assert_close(made.consensus, torch.full((3, 1), 1 / 3))  # the mean decides
        torch.testing.assert_close(made.confidence, torch.tensor([1 / 3]))
    agreed = F.consensus(one_hot[[0, 0, 1]], method="median", class_dim=0, logits=False)
    assert agreed.consensus.flatten().tolist() == [1.0, 0.0, 0.0]
    hopeless = F.consensus(torch.full((2, 3, 1), -INF), class_dim=0)
    assert hopeless.consensus.isnan().all()
    assert hopeless.confidence.item() == 0.0


def test_hundreds_of_classes():
    logits = torch.randn(6, 2, 1000, 4, 5, generator=torch.Generator().manual_seed(5))
    center, confidence, _ = F.consensus(logits, class_dim=1)
    expected = logits.double().softmax(2).mean(0)
    assert_close(center, expected, torch.float32)
    assert_close(confidence, expected.amax(1), torch.float32)


# CShift's scaled distances


@pytest.mark.parametrize("scale_dims", [(-2, -1), (), (0,)])
@pytest.mark.parametrize("method", ["mean", "median"])
def test_distances_are_scaled_over_messages_and_dimensions(scale_dims, method):
    messages = draw(4, 2, 3, 5, dtype=DOUBLE, abstain=0.1)
    start = messages[-1].nan_to_num()
    options = {"method": method, "kernel": "linear", "bandwidth": 0.3, "start": start}
    center, confidence, shares = F.consensus(messages, scale_dims=scale_dims, **options)
    far = (messages - start).abs()
    dims = (0, *(d % 3 + 1 for d in scale_dims))
    low = far.nan_to_num(nan=INF).amin(dims, keepdim=True)[0].expand(start.shape)
    high = far.nan_to_num(nan=0.0).amax(dims, keepdim=True)[0].expand(start.shape)
    unit = torch.where(high > low, high - low, 1.0)
    for at in product(*map(range, start.shape)):
        scale = low[at].item(), unit[at].item()
        values = messages[(slice(None), *at)].tolist()
        trim = 0.5 if method == "median" else 0.0
        expected = element(values, [1.0] * 4, trim, "linear", 0.3, 1, start[at].item(), scale)
        assert center[at].item() == pytest.approx(expected[0], nan_ok=True)
        assert confidence[at].item() == pytest.approx(expected[1])
        assert shares[(slice(None), *at)].tolist() == pytest.approx(expected[2])


def test_scaled_steps_follow_each_other():
    messages = draw(5, 4, 6, dtype=DOUBLE)
    options = {"kernel": "flat", "bandwidth": 0.4, "scale_dims": (-1,)}
    once = F.consensus(messages, **options)
    twice = F.consensus(messages, start=once.consensus, **options)
    both = F.consensus(messages, iterations=2, **options)
    for a, b in zip(twice, both, strict=True):
        assert torch.equal(a, b)


# Layouts


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("class_dim", [None, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout, class_dim):
    messages = [LAYOUTS[layout](x) for x in draw(5, 2, 3, 6, 37)]
    mixed = [messages[0].contiguous(), *messages[1:]]
    options = {"method": "median", "class_dim": class_dim, "bandwidth": 0.5, "kernel": "gaussian"}
    plain = F.consensus([x.contiguous() for x in messages], **options)
    for made in (F.consensus(messages, **options), F.consensus(mixed, **options)):
        for a, b in zip(made, plain, strict=True):
            torch.testing.assert_close(a, b)
    if layout in ("channels last", "transposed"):  # the first message's layout is kept
        assert F.consensus(messages).consensus.stride() == messages[0].stride()


def test_stacked_and_separate_messages_are_the_same():
    messages = draw(7, 3, 5)
    for a, b in zip(F.consensus(messages), F.consensus(list(messages)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_small_and_empty(shape):
    messages = draw(3, *shape)
    center, confidence, weights = F.consensus(messages, method="median", kernel="flat", bandwidth=9)
    assert center.shape == confidence.shape == shape
    assert weights.shape == (3, *shape)
    assert torch.equal(center, messages.median(0).values if messages.numel() else messages[0])


# The operator


OPTIONS = (
    {},
    {"method": "median", "bandwidth": 0.5},
    {"method": "trimmed_mean", "kernel": "linear", "bandwidth": 2.0},
    {"class_dim": 0, "method": "median"},
    {"kernel": "gaussian", "bandwidth": 0.5, "scale_dims": (-1,)},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_without_a_break(options):
    torch._dynamo.reset()
    messages = list(draw(4, 3, 8))

    def vote(messages):
        return F.consensus(messages, **options)

    compiled = torch.compile(vote, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(messages), vote(messages), strict=True):
        assert torch.equal(a, b)
    center = compiled([x.T for x in messages] if "class_dim" not in options else messages)[0]
    assert center.isfinite().all()


@pytest.mark.parametrize("kernel", [0, 2])
@pytest.mark.parametrize("class_dim", [None, 1])
def test_operators_are_well_formed(class_dim, kernel):
    messages = [x.T for x in draw(3, 4, 5)]
    args = messages, None, None, None, None, class_dim, True, 0.5, kernel, 1.0, 2
    opcheck(ops.consensus, args)
    opcheck(ops.consensus_spread, (messages, messages[0]))


def test_a_kernel_serves_and_the_formula_agrees():
    messages = list(draw(6, 9, 40, abstain=0.1))
    args = messages, weights_of(6, 9, 40), None, None, None, None, True, 0.5, 3, 1.5, 2
    for a, b in zip(ops.consensus(*args), formulas.consensus(*args), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    spread = ops.consensus_spread(messages, messages[2].nan_to_num())
    for a, b in zip(spread, formulas.spread(messages, messages[2].nan_to_num()), strict=True):
        assert torch.equal(a, b)


def test_a_consensus_has_no_gradient():
    live = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"require grad.*detach"):
        F.consensus(live)
    with pytest.raises(ValueError, match="require grad"):
        F.consensus(live.detach(), weight=torch.ones(2, requires_grad=True))
    with torch.no_grad():
        made = F.consensus(2 * live)
    assert not any(x.requires_grad for x in made)


X = torch.zeros(3, 4, 5)
ERRORS = [
    ({"messages": []}, ValueError, "messages: expected one message or more, got none"),
    ({"messages": torch.zeros(0, 3)}, ValueError, "messages: .*got none"),
    ({"messages": torch.tensor(1.0)}, ValueError, "messages: .*stacked on axis 0"),
    ({"messages": 3}, TypeError, "messages: expected a tensor, got int"),
    ({"messages": [X, X[0]]}, ValueError, r"messages\[1\]: expected shape \(3, 4, 5\)"),
    ({"messages": [X, X.double()]}, ValueError, r"messages\[1\]: expected dtype torch.float32"),
    ({"messages": [X, X.to("meta")]}, ValueError, r"messages\[1\]: expected device cpu, got meta"),
    ({"messages": [X, 1]}, TypeError, r"messages\[1\]: expected a tensor"),
    ({"messages": X.long()}, TypeError, r"messages: .*floating.*torch.int64"),
    ({"method": "mode"}, ValueError, "method: expected one of mean, median, .*got 'mode'"),
    ({"trim": 0.5}, ValueError, "trim: expected a share from 0 to below 1/2, got 0.5"),
    ({"trim": NAN}, ValueError, "trim: .*got nan"),
    ({"kernel": "box", "bandwidth": 1}, ValueError, "kernel: .*flat, linear, gaussian, got 'box'"),
    ({"kernel": "flat"}, ValueError, "bandwidth: expected a positive number .*got None"),
    ({"bandwidth": 0.0}, ValueError, "bandwidth: expected a positive finite number, got 0.0"),
    ({"bandwidth": INF}, ValueError, "bandwidth: .*got inf"),
    ({"iterations": 2**70}, ValueError, "iterations: expected an integer from 1 "),
    (
        {"kernel": "flat", "bandwidth": 1.0, "scale_dims": (0, -2)},
        ValueError,
        "scale_dims: expected dimensions that differ",
    ),
    ({"iterations": 0}, ValueError, "iterations: expected an integer from 1 .*got 0"),
    ({"start": X[0]}, ValueError, "start: expected None without a kernel"),
    (
        {"start": X, "kernel": "flat", "bandwidth": 1},
        ValueError,
        r"start: expected shape \(4, 5\), got shape \(3, 4, 5\)",
    ),
    ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(3,\) .*\(3, 4, 5\), got"),
    ({"weight": torch.ones(1, 4, 5)}, ValueError, "weight: expected shape"),
    ({"weight": torch.ones(3, 5)}, ValueError, "weight: expected shape"),
    ({"weight": [1, 2, 3]}, TypeError, "weight: expected a tensor, got list"),
    ({"class_dim": 2}, ValueError, "class_dim: expected dimensions of a message, which has 2"),
    ({"class_dim": "c"}, TypeError, "class_dim: expected dimensions as integers"),
    ({"messages": X[:, :0], "class_dim": 0}, ValueError, "class_dim: expected classes, got none"),
    ({"scale_dims": ()}, ValueError, "scale_dims: expected None without a kernel"),
    (
        {"scale_dims": (), "kernel": "flat", "bandwidth": 1.0, "class_dim": 0},
        ValueError,
        "scale_dims: expected None with class_dim",
    ),
    (
        {"scale_dims": (5,), "kernel": "flat", "bandwidth": 1.0},
        ValueError,
        "scale_dims: expected dimensions of a message",
    ),
]


def test_scaled_distances_of_nothing():
    center, *_ = F.consensus(torch.zeros(3, 2, 0), kernel="flat", bandwidth=1.0, scale_dims=(-1,))
    assert center.shape == (2, 0)


@pytest.mark.parametrize(("changes", "error", "text"), ERRORS)
def test_errors_name_the_argument(changes, error, text):
    with pytest.raises(error, match=text):
        F.consensus(**{"messages": X} | changes)


@pytest.mark.parametrize("name", consensus_benchmark.VOTES)
def test_benchmarked_votes_are_right(name):
    row = consensus_benchmark.run(name, CpuClock(), budget=0.0, small=True)
    assert row["faster"] > 0


def test_a_wrong_vote_has_no_speed(monkeypatch):
    right = F.consensus
    ones = torch.ones(8, 3, 12, 12)
    monkeypatch.setattr(F, "consensus", lambda *x, **y: right(*x, **y)._replace(consensus=ones))
    with pytest.raises(RuntimeError, match=r"median: error .* no speed"):
        consensus_benchmark.run("median", CpuClock(), budget=0.0, small=True)


def test_a_kernel_is_registered():
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key("mtkd::consensus", "CPU")
    assert kernel == (INTERPRETED or ops.extension is not None)
