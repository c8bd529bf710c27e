"""Tiles of a projection: they cover everything once and respect the budget."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mtkd.plan import GOOD_ROWS, stash_fits, tiles

DIMS = st.lists(st.integers(1, 5000), min_size=1, max_size=40).map(tuple)


@given(st.integers(0, 20000), DIMS, st.integers(1, 8), st.integers(1, 1 << 28), st.booleans())
def test_tiles_cover_teachers_in_order_within_the_budget(rows, dims, parts, workspace, fill):
    plan = tiles(rows, dims, parts, workspace, fill=fill)
    edges = [group[0] for group in plan.groups] + [len(dims)]
    assert edges[0] == 0
    assert list(plan.groups) == list(pairwise(edges))
    assert all(first < last for first, last in plan.groups)
    assert 1 <= plan.rows <= max(1, rows if fill else min(rows, GOOD_ROWS))
    widest = max(sum(dims[first:last]) for first, last in plan.groups)
    assert plan.rows == 1 or plan.rows * widest * parts * 4 <= workspace


def test_one_tile_when_all_fits():
    assert tiles(64, (64,) * 256, 2, 256 << 20).groups == ((0, 256),)


def test_stash_fits_counts_bytes():
    assert stash_fits(10, 100, 12_000)  # the gradient, a scaled tile and its factors
    assert not stash_fits(10, 100, 11_999)
    assert not stash_fits(10, 100, 12_000, item=8)
