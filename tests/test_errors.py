"""Bad input: one clear error that names the argument, what was expected and what came."""

import pytest
import torch
from torch.distributed.tensor import DTensor

import mtkd.functional as F

N, H, DIMS = 4, 6, (3, 5)
D = sum(DIMS)


def row(**changes):
    arguments = {
        "mean": torch.zeros(N, D),
        "log_std": torch.zeros(N, D),
        "target": torch.zeros(N, D),
        "dims": DIMS,
    }
    return F.gaussian_nll(**arguments | changes)


def linear(**changes):
    arguments = {
        "input": torch.zeros(N, H),
        "linear_weight": torch.zeros(2, D, H),
        "target": torch.zeros(N, D),
        "dims": DIMS,
    }
    return F.linear_gaussian_nll(**arguments | changes)


Z = torch.zeros
CASES = [
    (
        row,
        {"mean": [[1.0]], "log_std": [1], "target": [1], "dims": None},
        TypeError,
        r"mean\[0\]: expected a tensor, got list",
    ),
    (row, {"mean": 3}, TypeError, "mean: expected a tensor, got int"),
    (row, {"target": Z(N, D, dtype=torch.int64)}, TypeError, "target: .*floating.*torch.int64"),
    (row, {"target": Z(N, D, requires_grad=True)}, ValueError, "target: .*not require grad"),
    (row, {"log_std": Z(N, 9)}, ValueError, r"log_std: expected shape \(4, 8\), got .*\(4, 9\)"),
    (row, {"target": Z(5, D)}, ValueError, r"target: expected shape \(4, 8\), got .*\(5, 8\)"),
    (row, {"target": Z(N, D, device="meta")}, ValueError, "target: expected device cpu, got meta"),
    (row, {"dims": (3, 4)}, ValueError, r"dims: .*sum to the 8 columns.*\(3, 4\), which sum to 7"),
    (row, {"dims": (8, 0)}, ValueError, r"dims: expected .* positive width .*\(8, 0\)"),
    (row, {"dims": ()}, ValueError, r"dims: expected a positive width"),
    (row, {"dims": 8}, TypeError, "dims: expected a sequence of widths, got int"),
    (row, {"dims": (3.0, 5.0)}, TypeError, r"dims: expected integers, got \(3.0, 5.0\)"),
    (row, {"bound": 0.0}, ValueError, "bound: expected None or a positive finite number, got 0.0"),
    (row, {"bound": float("inf")}, ValueError, "bound: .*got inf"),
    (row, {"bound": float("nan")}, ValueError, "bound: .*got nan"),
    (row, {"bound": 1e39}, ValueError, "bound: .*got 1e\\+39"),
    (row, {"bound": 1e-46}, ValueError, "bound: .*got 1e-46"),
    (row, {"mean": Z(N, D, dtype=torch.float8_e4m3fn)}, TypeError, "mean: .*torch.float8_e4m3fn"),
    (
        row,
        {"mean": Z(N, 0, D), "log_std": Z(N, 0, D), "mode_logits": Z(N, 0, 2)},
        ValueError,
        "mode_logits: expected at least one mode, got none",
    ),
    (
        linear,
        {"linear_weight": Z(2, 0, D, H), "mode_weight": Z(0, 2, H)},
        ValueError,
        "linear_weight: expected at least one mode or column, got none",
    ),
    (row, {"bound": "1"}, ValueError, "bound: .*got '1'"),
    (row, {"mean": Z(())}, ValueError, r"mean: expected shape \(\*, D\), got a 0-dim tensor"),
    (row, {"target": Z(N, D).to_sparse()}, TypeError, "target: expected a dense tensor, got .*coo"),
    (row, {"mean": Z(N, D, dtype=torch.complex64)}, TypeError, "mean: .*torch.complex64"),
    (row, {"weight": Z(2, device="meta")}, ValueError, "weight: expected device cpu, got meta"),
    (row, {"reduction": "avg"}, ValueError, "reduction: .* one of none, mean, sum, got 'avg'"),
    (row, {"weight": Z(3)}, ValueError, r"weight: .* shape \(2,\) or \(4, 2\), got \(3,\)"),
    (row, {"weight": Z(2, dtype=torch.int64)}, TypeError, "weight: .*torch.int64"),
    (row, {"weight": [1.0, 2.0]}, TypeError, "weight: expected a tensor or a callable, got list"),
    (row, {"mask": Z(N, 2)}, TypeError, "mask: expected a bool tensor .*torch.float32"),
    (row, {"mask": Z(N, 3, dtype=torch.bool)}, ValueError, r"mask: expected shape \(4, 2\)"),
    (row, {"denominator": 2.0, "reduction": "sum"}, ValueError, "denominator: .*mean"),
    (row, {"denominator": Z(2)}, ValueError, r"denominator: expected shape \(\), got \(2,\)"),
    (row, {"denominator": -1.0}, ValueError, "denominator: expected a finite number.*got -1.0"),
    (row, {"denominator": "2"}, TypeError, "denominator: expected a number .*str"),
    (row, {"mode_logits": Z(N, 2, 2)}, ValueError, r"mean: .*\(4, 2, 8\), got shape \(4, 8\)"),
    (row, {"mean": [Z(1)], "log_std": [Z(1)], "target": [Z(1)]}, ValueError, "dims: .*None"),
    (
        row,
        {"mean": [Z(N, 3), Z(N, 5)], "log_std": [Z(N, 3)], "target": [], "dims": None},
        ValueError,
        "log_std: expected 2 tensors like mean, got 1",
    ),
    (
        row,
        {"mean": [Z(N, 3)], "log_std": Z(N, 3), "target": Z(N, 3), "dims": None},
        TypeError,
        "log_std: expected 1 tensors like mean, got Tensor",
    ),
    (row, {"log_std": [Z(N, D)]}, TypeError, "log_std: expected a tensor like mean, got list"),
    (row, {"mean": [], "log_std": [], "target": []}, ValueError, "mean: .*got none"),
    (linear, {"input": Z(())}, ValueError, "input: expected shape .*got a 0-dim tensor"),
    (linear, {"input": Z(N, H + 1)}, ValueError, r"linear_weight: expected shape \(2, 8, 7\)"),
    (linear, {"linear_weight": Z(D, H)}, ValueError, r"linear_weight: .* shape \(2, D, H\)"),
    (linear, {"linear_weight": Z(3, D, H)}, ValueError, r"linear_weight: .*\(2, 8, 6\)"),
    (linear, {"linear_bias": Z(D)}, ValueError, r"linear_bias: expected shape \(2, 8\)"),
    (linear, {"target": Z(N, D + 1)}, ValueError, r"target: expected shape \(4, 8\)"),
    (linear, {"mode_weight": Z(2, 2, H)}, ValueError, r"linear_weight: .*\(2, M, D, H\)"),
    (linear, {"mode_bias": Z(2, 2)}, ValueError, "mode_bias: expected None without mode_weight"),
    (linear, {"linear_weight": Z(2, D, H, device="meta")}, ValueError, "linear_weight: .*got meta"),
    (linear, {"linear_bias": Z(2, D, dtype=torch.int32)}, TypeError, "linear_bias: .*torch.int32"),
    (
        linear,
        {"linear_weight": Z(2, 3, D, H), "mode_weight": Z(3, 1, H)},
        ValueError,
        r"mode_weight: expected shape \(3, 2, 6\), got shape \(3, 1, 6\)",
    ),
    (linear, {"target": Z(N, D, requires_grad=True)}, ValueError, "target: .*not require grad"),
]


@pytest.mark.parametrize(("call", "changes", "error", "message"), CASES)
def test_one_clear_error(call, changes, error, message):
    with pytest.raises(error, match=message) as raised:
        call(**changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("call", [row, linear])
def test_the_unchanged_call_is_fine(call):
    assert call().isfinite()


def test_dtensor_is_a_sentence_not_a_crash(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        mean = DTensor.from_local(Z(N, D), mesh)
        with pytest.raises(TypeError, match="mean: expected a plain tensor, got a DTensor"):
            row(mean=mean)
    finally:
        torch.distributed.destroy_process_group()


def test_widths_may_have_names():
    """Those of a store, in its order."""
    student, target = torch.randn(2, 5, 8).unbind()
    named = {"cnn": 3, "pca": 5}
    assert torch.equal(F.mse(student, target, named), F.mse(student, target, (3, 5)))
    plain = F.kl_div(student, target, (3, 5), reduction="none")
    assert torch.equal(F.kl_div(student, target, named, reduction="none"), plain)
    compiled = torch.compile(F.mse, fullgraph=True, backend="eager")
    assert torch.equal(compiled(student, target, named), F.mse(student, target, (3, 5)))
