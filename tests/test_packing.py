"""Packing ragged teachers, and when sequences are packed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtkd.packing import SMALL, join_small, offsets, pack, split


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(0, 3), max_size=2))
def test_split_undoes_pack(dims, leading):
    tensors = [torch.randn(*leading, dim) for dim in dims]
    columns, widths = pack(tensors)
    assert widths == tuple(dims)
    assert offsets(dims)[-1] == columns.shape[-1]
    assert all(torch.equal(a, b) for a, b in zip(split(columns, dims), tensors, strict=True))


def test_pack_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"tensors\[1\]: expected leading dimensions \(2,\)"):
        pack([torch.zeros(2, 3), torch.zeros(3, 3)])
    with pytest.raises(ValueError, match="tensors: expected one tensor a teacher, got none"):
        pack([])


def test_small_calls_join_and_large_ones_stay():
    small = [((2,), torch.zeros(3, 2)), ((4,), torch.ones(3, 4))]
    (dims, columns), *rest = join_small(small)
    assert (dims, tuple(columns.shape), rest) == ((2, 4), (3, 6), [])
    large = [((SMALL,), torch.zeros(2, SMALL)), ((4,), torch.ones(2, 4))]
    assert join_small(large) is large
    mixed = [((2,), torch.zeros(3, 2)), ((2,), torch.zeros(3, 2, dtype=torch.float64))]
    assert join_small(mixed) is mixed
