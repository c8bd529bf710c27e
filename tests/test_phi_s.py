"""PhiS: covariance, rotation and inverse; Hadamard matrices of every order."""

import copy
import io
import math
import re

import pytest
import torch

from mtkd.nn.hadamard import hadamard
from mtkd.nn.phi_s import PhiS

DIMS = (8, 1, 12)
NAMED = {"cnn": 8, "depth": 1, "vit.b16": 12}
WITHOUT = {92, 116, 156, 172, 184, 188, 232, 236}  # multiples of 4 that no construction gives


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def store(dims=DIMS, rows=500):
    """Correlated columns far from zero, of variances that differ by ten orders of magnitude."""
    parts = []
    for width in dims:
        mix = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
        scale = torch.logspace(-3, 2, width, dtype=torch.float64)
        parts.append((torch.randn(rows, width, dtype=torch.float64) * scale) @ mix + 30)
    return torch.cat(parts, 1)


def naive(rows):
    """PHI-S by its definition, from all rows of one teacher."""
    mean, width = rows.mean(0), rows.shape[1]
    values, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0).reshape(width, width))
    matrix = hadamard(width).double() / math.sqrt(width)
    return (rows - mean) @ (matrix @ vectors.T / values.mean().sqrt()).T


@pytest.mark.parametrize("order", [n for n in range(1, 257) if n < 3 or n % 4 == 0])
def test_hadamard_matrices_of_every_order(order):
    if order in WITHOUT:
        below = next(n for n in range(order - 4, 0, -4) if n not in WITHOUT)
        with pytest.raises(ValueError, match=f"order: .* got {order}; nearest: {below} and "):
            hadamard(order)
        return
    matrix = hadamard(order)
    assert matrix.dtype == torch.int8
    assert matrix.shape == (order, order)
    matrix = matrix.int()
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int32))


@pytest.mark.parametrize("order", [384, 640, 768, 1000, 1024, 1152, 1280, 1408, 1536, 1664, 2048])
def test_hadamard_matrices_of_teachers(order):
    matrix = hadamard(order).float()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_powers_of_two_are_sylvesters():
    expected = torch.ones(1, 1, dtype=torch.int8)
    for order in (1, 2, 4, 8, 16):
        assert torch.equal(hadamard(order), expected)
        expected = torch.cat(
            [torch.cat([expected, expected], 1), torch.cat([expected, -expected], 1)]
        )


@pytest.mark.parametrize(
    ("order", "nearest"),
    [(0, "1"), (-4, "1"), (3, "2 and 4"), (92, "88 and 96"), (186, "180 and 192")],
)
def test_other_orders_are_named_with_their_neighbours(order, nearest):
    with pytest.raises(ValueError, match=f"got {order}; nearest: {nearest}$"):
        hadamard(order)


def test_the_definition():
    rows = store()
    out = PhiS(DIMS, eps=1e-30).estimate(rows.split(70))(rows)
    for part, of_part in zip(out.split(list(DIMS), 1), rows.split(list(DIMS), 1), strict=True):
        expected = naive(of_part)
        # eigenvectors have no signs: compare what does not depend on them
        torch.testing.assert_close(part @ part.T, expected @ expected.T, rtol=1e-9, atol=1e-8)
        torch.testing.assert_close(part.var(0, correction=0), torch.ones(part.shape[1]).double())


@pytest.mark.parametrize("fallback", [None, "hartley"])
def test_covariance_identity(fallback):
    dims = DIMS if fallback is None else (92, 3, 7)
    rows, mask = store(dims), torch.rand(500, 3) < 0.7
    spoiled = torch.where(mask.repeat_interleave(torch.tensor(dims), 1), rows, math.nan)
    module = PhiS(dims, fallback=fallback, eps=1e-30).estimate(
        zip(spoiled.split(99), mask.split(99), strict=True)
    )
    out = module(rows)
    parts = zip(out.split(dims, 1), rows.split(dims, 1), mask.T, dims, strict=True)
    for (part, of_part, counted, width), (gain, rotation) in zip(
        parts, module._parts(slice(None)), strict=True
    ):
        identity = torch.eye(width, dtype=torch.float64)
        torch.testing.assert_close(rotation @ rotation.T, identity, rtol=0, atol=1e-13)
        before = torch.cov(of_part[counted].T, correction=0).reshape(width, width)
        after = torch.cov(part[counted].T, correction=0).reshape(width, width)
        torch.testing.assert_close(
            after, gain**2 * rotation @ before @ rotation.T, atol=1e-9, rtol=0
        )
        torch.testing.assert_close(after.diagonal(), torch.ones(width).double(), rtol=1e-7, atol=0)
        torch.testing.assert_close(
            part[counted].mean(0), torch.zeros(width).double(), rtol=0, atol=1e-9
        )


def test_hadamard_spreads_every_eigenvector_evenly_and_hartley_nearly():
    rows = store((12,))
    vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0)).eigenvectors
    for fallback, most in ((None, 1 + 1e-12), ("hartley", 2.2)):
        module = PhiS((12,), fallback=fallback).estimate([rows])
        ((_, rotation),) = module._parts(slice(None))
        assert (12 * (rotation @ vectors).square()).max() < most


def test_turns_end_at_equal_variances():
    rows = torch.randn(300, 5, dtype=torch.float64)
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(rows.T))).T  # nothing to turn
    for each in (white, rows * torch.tensor([1.0, 0, 0, 0, 0]).double(), rows * 0 + 2):
        out = PhiS((5,), fallback="hartley", eps=1e-30).estimate([each])(each)
        expected = torch.ones(5).double() * (each.std() > 0)
        torch.testing.assert_close(out.var(0, correction=0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inverse_and_structure(dtype):
    rows = store().to(dtype)
    module = PhiS(NAMED).estimate(rows.split(100))
    out = module(rows)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = rows.to(out.dtype)
    torch.testing.assert_close(module.inverse(out), wide, rtol=1e-6, atol=2e-4)
    parts = dict(zip(NAMED, rows.split(DIMS, 1), strict=True))
    by_name, as_list = module(parts), module(list(parts.values()))
    for name, one, other in zip(NAMED, as_list, out.split(DIMS, 1), strict=True):
        torch.testing.assert_close(by_name[name], other)
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(
            module.inverse(by_name)[name], parts[name].to(out.dtype), rtol=1e-6, atol=2e-4
        )
    assert module(rows.unflatten(0, (5, 100))).shape == (5, 100, 21)
    assert module(rows[0]).shape == (21,)


def test_before_and_without_statistics_nothing_changes():
    rows = store()
    module = PhiS(DIMS)
    assert torch.equal(module(rows), rows)
    mask = torch.ones(500, 3, dtype=torch.bool)
    mask[:, 2] = False
    out = module.estimate([(rows, mask)])(rows)
    assert torch.equal(out[:, 9:], rows[:, 9:])
    state = copy.deepcopy(module.state_dict())
    module.train()(rows, mask)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_state_and_dtype():
    rows = store()
    module, resumed = PhiS(DIMS).estimate([rows]), PhiS(DIMS)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    assert torch.equal(resumed(rows), module(rows))
    assert torch.equal(resumed.half()(rows), module(rows))
    assert repr(module) == "PhiS(teachers=3, width=21, eps=1e-08)"
    assert repr(PhiS((3,), fallback="hartley")).endswith("eps=1e-08, fallback='hartley')")


def test_compiled_under_autocast_and_without_the_host():
    rows = store().float()
    module = PhiS(DIMS).estimate([rows])
    expected = module(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(rows), expected)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(rows), expected)
    assert module.to("meta")(rows.to("meta")).device.type == "meta"


def test_arguments_that_do_not_fit():
    def fails(error, message, call):
        with pytest.raises(error, match=re.escape(message)):
            call()

    orders = (
        "dims: expected an order of a Hadamard matrix by Sylvester, Paley or Kronecker products"
    )
    advice = '; or pass fallback="hartley"'
    fails(ValueError, f"{orders}, got 92; nearest: 88 and 96{advice}", lambda: PhiS((8, 92)))
    fails(ValueError, f"{orders}, got 3; nearest: 2 and 4{advice}", lambda: PhiS((3,)))
    fails(
        ValueError,
        "fallback: expected None or \"hartley\", got 'qr'",
        lambda: PhiS((8,), fallback="qr"),
    )
    fails(ValueError, "eps: expected a positive number", lambda: PhiS((8,), eps=0.0))
    module = PhiS(DIMS)
    fails(ValueError, "target: expected shape (4, 21)", lambda: module(torch.randn(4, 20)))
    fails(
        ValueError, "target: expected device cpu", lambda: module(torch.randn(4, 21, device="meta"))
    )
    fails(ValueError, "output: expected shape (4, 21)", lambda: module.inverse(torch.randn(4, 20)))
    mask = torch.ones(4, 2, dtype=torch.bool)
    fails(
        ValueError,
        "mask: expected shape (4, 3)",
        lambda: module.estimate([(torch.randn(4, 21), mask)]),
    )
