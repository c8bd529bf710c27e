"""Gaussian heads: values, gradients, state dicts, distributions; errors that name the argument."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from mtkd.nn import GaussianHeads

DIMS = (3, 5, 2)
NAMED = {"cnn": 3, "vit_b16.in21k": 5, "pca": 2}
H, N = 7, 6
ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "tanh": nn.Tanh()}

CONFIGS = {
    "depth 0": {},
    "depth 1": {"depth": 1, "hidden_features": 4},
    "depth 2 ratio": {"depth": 2, "hidden_features": 1.4, "activation": "gelu"},
    "norm 0": {"norm": True},
    "norm 1": {"norm": True, "depth": 1, "hidden_features": 6, "activation": "silu"},
    "norm 2 free": {"norm": True, "depth": 2, "hidden_features": 6, "bound": None},
    "modes 0": {"modes": 3},
    "modes 1": {"modes": 2, "depth": 1, "hidden_features": 4, "per_dim": False},
    "modes 2 norm": {"modes": 2, "depth": 2, "hidden_features": 2.0, "norm": True},
    "no bias 0": {"bias": False, "modes": 2},
    "no bias 1": {"bias": False, "depth": 1, "hidden_features": 4, "activation": "tanh"},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def make(dims=DIMS, **config):
    """Heads with every parameter moved off its initial value."""
    heads = GaussianHeads(H, dims, **config).double()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return heads


def inputs(leading=(N,), dtype=torch.float64):
    student = torch.randn(*leading, H, dtype=dtype, requires_grad=True)
    return student, torch.randn(*leading, sum(DIMS), dtype=dtype)


class Reference(nn.Module):
    """One teacher's head as one would write it, loading that teacher's part of a state dict."""

    def __init__(self, state, dim, config):
        super().__init__()
        self.state, self.dim = state, dim
        self.depth, self.modes = config.get("depth", 0), config.get("modes", 1)
        self.norm, self.bound = config.get("norm", False), config.get("bound", 1.0)
        self.activation = ACTIVATIONS[config.get("activation", "relu")]

    def linear(self, name, x):
        weight = self.state[f"{name}.weight"]
        out = x @ weight.flatten(0, -2).T
        if f"{name}.bias" in self.state:
            out = out + self.state[f"{name}.bias"].flatten()
        return out.unflatten(-1, weight.shape[:-1])

    def layer_norm(self, layer, x):
        if not self.norm:
            return x
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        if layer == 0:
            return x
        return x * self.state[f"norm.{layer}.weight"] + self.state[f"norm.{layer}.bias"]

    def forward(self, x, target):
        """Negative log-likelihood, with its constant, from torch.distributions."""
        for layer in range(self.depth):
            x = self.activation(self.linear(f"hidden.{layer}", self.layer_norm(layer, x)))
        x = self.layer_norm(self.depth, x)
        mean, log_std = self.linear("mean", x), self.linear("log_std", x)
        if self.bound is not None:
            log_std = self.bound * torch.tanh(log_std / self.bound)
        normal = torch.distributions.Normal(mean, log_std.exp())
        if self.modes == 1:
            return -normal.log_prob(target).sum(-1)
        joint = normal.log_prob(target.unsqueeze(-2)).sum(-1)
        return -(torch.log_softmax(self.linear("modes", x), -1) + joint).logsumexp(-1)


def reference(heads, config, student, target):
    """The matrix (*, T) and the leaves: a teacher's own copy of its part of the state dict."""
    leaves, columns = [], []
    for teacher, part in enumerate(target.split(list(DIMS), -1)):
        prefix = f"teachers.{heads.teachers.names[teacher]}."
        state = {
            key.removeprefix(prefix): value.clone().requires_grad_()
            for key, value in heads.state_dict().items()
            if key.startswith(prefix)
        }
        leaves.append(state)
        dim = DIMS[teacher]
        loss = Reference(state, dim, config)(student, part) - dim / 2 * math.log(2 * math.pi)
        columns.append(loss / dim if config.get("per_dim", True) else loss)
    return torch.stack(columns, -1), leaves


@pytest.mark.parametrize("dims", [DIMS, NAMED], ids=["sequence", "mapping"])
@pytest.mark.parametrize("leading", [(N,), (2, 3), ()], ids=str)
def test_values_and_gradients_are_those_of_plain_heads(config, dims, leading):
    heads = make(dims, **config)
    student, target = inputs(leading)
    matrix, leaves = reference(heads, config, student, target)
    torch.testing.assert_close(heads(student, target, reduction="none"), matrix)
    loss = heads(student, target)
    torch.testing.assert_close(loss, matrix.mean())
    (expected,) = torch.autograd.grad(matrix.mean(), student, retain_graph=True)
    matrix.mean().backward(inputs=[x for state in leaves for x in state.values()])
    loss.backward()
    torch.testing.assert_close(student.grad, expected)
    for name, state in zip(heads.teachers.names, leaves, strict=True):
        for piece in heads.pieces():
            if piece.name.startswith(f"teachers.{name}."):
                grad = heads.get_parameter(piece.parameter).grad[piece.where]
                wanted = state[piece.name.removeprefix(f"teachers.{name}.")].grad
                torch.testing.assert_close(grad, wanted)


def test_targets_packed_as_a_sequence_and_by_name_agree(config):
    heads = make(NAMED, **config)
    student, target = inputs()
    parts = target.split(list(DIMS), -1)
    by_name = dict(zip(reversed(NAMED), reversed(parts), strict=True))
    expected = heads(student, target, reduction="none")
    torch.testing.assert_close(heads(student, parts, reduction="none"), expected)
    torch.testing.assert_close(heads(student, by_name, reduction="none"), expected)


def test_distributions_agree_with_the_loss(config):
    heads = make(NAMED, **config)
    student, target = inputs((2, 3))
    loss = heads(student, target, reduction="none")
    named = heads.distributions(student)
    assert tuple(named) == tuple(NAMED)
    columns = zip(named.values(), target.split(list(DIMS), -1), DIMS, loss.unbind(-1), strict=True)
    for made, part, dim, column in columns:
        assert (made.batch_shape, made.event_shape) == ((2, 3), (dim,))
        total = column * dim if config.get("per_dim", True) else column
        torch.testing.assert_close(-made.log_prob(part), total + dim / 2 * math.log(2 * math.pi))
    unnamed = make(DIMS, **config).distributions(student)
    assert isinstance(unnamed, list)
    assert [made.event_shape for made in unnamed] == [(dim,) for dim in DIMS]


def test_mask_weight_and_denominator_reach_the_loss(config):
    heads = make(**config)
    student, target = inputs()
    matrix = heads(student, target, reduction="none").detach()
    mask = torch.rand(N, 3) < 0.6
    weight = torch.rand(3, dtype=torch.float64)
    spoiled = [
        part.masked_fill(~mask[:, [teacher]], math.nan)
        for teacher, part in enumerate(target.split(list(DIMS), -1))
    ]
    counted = (matrix * weight)[mask].sum()
    loss = heads(student, spoiled, mask=mask, weight=weight)
    torch.testing.assert_close(loss, counted / (weight * mask).sum())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in [student, *heads.parameters()])
    loss = heads(student, spoiled, mask=mask, weight=weight, denominator=2.0)
    torch.testing.assert_close(loss, counted / 2)


def test_state_dict_names_are_the_teachers():
    heads = GaussianHeads(H, NAMED, depth=2, hidden_features=4, modes=2, norm=True)
    parts = ("norm.1", "norm.2", "hidden.0", "hidden.1", "mean", "log_std", "modes")
    expected = {f"teachers.{n}.{p}.{k}" for n in NAMED for p in parts for k in ("weight", "bias")}
    assert set(heads.state_dict()) == expected
    assert heads.state_dict()["teachers.pca.mean.weight"].shape == (2, 2, 4)
    linear = GaussianHeads(H, DIMS, bias=False)
    expected = {f"teachers.{t}.{p}.weight" for t in range(3) for p in ("mean", "log_std")}
    assert set(linear.state_dict()) == expected


def test_pieces_cover_every_parameter_once(config):
    heads = make(**config)
    covered = {name: torch.zeros_like(p) for name, p in heads.named_parameters()}
    for _, parameter, where in heads.pieces():
        covered[parameter][where] += 1
    assert covered
    assert all((count == 1).all() for count in covered.values())


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_inside_a_model(config, assign):
    student, target = inputs()
    saved = nn.ModuleDict({"heads": make(NAMED, **config)})
    loaded = nn.ModuleDict({"heads": make(NAMED, **config)})
    optimizer_order = [name for name, _ in loaded.named_parameters()]
    loaded.load_state_dict(saved.state_dict(), assign=assign)
    assert [name for name, _ in loaded.named_parameters()] == optimizer_order
    expected = saved["heads"](student, target, reduction="none")
    torch.testing.assert_close(loaded["heads"](student, target, reduction="none"), expected)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for parameter in saved.parameters():
        parameter.data.zero_()  # what was loaded is a copy
    torch.testing.assert_close(loaded["heads"](student, target, reduction="none"), expected)


def test_assign_fills_heads_on_the_meta_device(config):
    student, target = inputs()
    saved = make(NAMED, **config)
    with torch.device("meta"):
        heads = GaussianHeads(H, NAMED, **config)
    heads.load_state_dict(saved.state_dict(), assign=True)
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float64}
    torch.testing.assert_close(heads(student, target), saved(student, target))


def test_loading_maps_teachers_by_name(config):
    student, target = inputs()
    saved = make(NAMED, **config)
    names = list(reversed(NAMED))
    other = make({name: NAMED[name] for name in names}, **config)
    other.load_state_dict(saved.state_dict())
    by_name = dict(zip(NAMED, target.split(list(DIMS), -1), strict=True))
    order = [list(NAMED).index(name) for name in names]
    expected = saved(student, target, reduction="none")[:, order]
    torch.testing.assert_close(other(student, by_name, reduction="none"), expected)


def test_strict_loading_names_the_keys():
    heads, state = make(NAMED), make(NAMED).state_dict()
    missing = "teachers.pca.mean.weight"
    value = state.pop(missing)
    before = heads.state_dict()[missing].clone()
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\).*"{missing}"'):
        heads.load_state_dict(state)
    result = heads.load_state_dict(state, strict=False)
    assert result.missing_keys == [missing]
    assert torch.equal(heads.state_dict()[missing], before)
    assert torch.equal(
        heads.state_dict()["teachers.cnn.mean.weight"], state["teachers.cnn.mean.weight"]
    )
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"teachers.dino.mean.weight"'):
        heads.load_state_dict(state | {missing: value, "teachers.dino.mean.weight": value})
    with pytest.raises(RuntimeError, match=rf"{missing}: expected shape \(2, 7\), got \(3, 7\)"):
        heads.load_state_dict(state | {missing: torch.zeros(3, 7)})


def test_state_dict_of_a_teacher_alone_loads_beside_others():
    alone, both = make({"pca": 2}), make(NAMED)
    result = both.load_state_dict(alone.state_dict(), strict=False)
    assert not result.unexpected_keys
    key = "teachers.pca.log_std.bias"
    assert torch.equal(both.state_dict()[key], alone.state_dict()[key])


def test_deepcopy_and_dtype(config):
    student, target = inputs()
    heads = make(**config)
    copied = copy.deepcopy(heads)
    torch.testing.assert_close(copied(student, target), heads(student, target))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.zero_()
    assert all(value.any() for value in copied.state_dict().values())
    copied.load_state_dict(heads.state_dict())
    assert not any(value.any() for value in copied.state_dict().values())
    single = copied.to(torch.float32)
    assert single(student.detach().float(), target).dtype == torch.float32


def test_initial_predictions_have_unit_deviation_and_linear_layers_start_as_torchs():
    heads = GaussianHeads(100, (50, 60), depth=1, hidden_features=64, modes=2, norm=True)
    for made in heads.distributions(torch.randn(4, 100)):
        assert torch.equal(
            made.component_distribution.stddev, torch.ones(4, 2, made.event_shape[0])
        )
    state = heads.state_dict()
    for layer, features in (("hidden.0", 100), ("mean", 64), ("modes", 64)):
        for kind in ("weight", "bias"):
            limit = state[f"teachers.1.{layer}.{kind}"].abs().max().item()
            assert limit <= 1 / math.sqrt(features)
        assert state[f"teachers.1.{layer}.weight"].abs().max() > 0.9 / math.sqrt(features)
    assert (state["teachers.0.norm.1.weight"] == 1).all()
    before = heads.hidden_0_weight.clone()
    heads.reset_parameters()
    assert not torch.equal(before, heads.hidden_0_weight)


def test_hidden_width_is_an_int_or_a_ratio_of_the_teachers():
    assert GaussianHeads(H, DIMS, depth=1, hidden_features=8).hidden == (8, 8, 8)
    assert GaussianHeads(H, DIMS, depth=1, hidden_features=1.4).hidden == (4, 7, 2)
    assert GaussianHeads(H, DIMS, depth=1, hidden_features=0.1).hidden == (1, 1, 1)


def test_autocast_makes_a_float32_loss_near_the_float32_one(config):
    heads = make(**config).float()
    student, target = inputs(dtype=torch.float32)
    expected = heads(student, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = heads(student, target.half())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0.03)  # bfloat16 has 8 bits
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in heads.parameters())


def test_bfloat16_module_computes_its_loss_in_float32(config):
    heads = make(**config).bfloat16()
    student, target = inputs(dtype=torch.bfloat16)
    exact = copy.deepcopy(heads).double()(student.double(), target)
    loss = heads(student, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact.float(), rtol=0.03, atol=0.03)
    columns = heads.distributions(student)[0]
    assert columns.sample().dtype == torch.float32


@pytest.mark.parametrize("name", ["depth 0", "norm 1", "modes 0"])
def test_compiles_without_a_graph_break(name):
    heads = make(**CONFIGS[name])
    student, target = inputs()
    expected = heads(student, target)
    compiled = torch.compile(heads, fullgraph=True)(student, target)
    torch.testing.assert_close(compiled, expected)
    (wanted,) = torch.autograd.grad(expected, student)
    (grad,) = torch.autograd.grad(compiled, student)
    torch.testing.assert_close(grad, wanted)


def test_training_fits_the_conditional_deviation():
    student = torch.randn(2000, H)
    target = student[:, :2] + 0.5 * torch.randn(2000, 2)
    heads = GaussianHeads(H, (2,))
    optimizer = torch.optim.Adam(heads.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        heads(student, target).backward()
        optimizer.step()
    (made,) = heads.distributions(student)
    assert abs(made.base_dist.scale.mean().item() - 0.5) < 0.03


def test_repr_names_the_teachers():
    assert "'pca': 2" in repr(GaussianHeads(H, NAMED))
    shown = repr(GaussianHeads(H, DIMS, depth=1, hidden_features=4, modes=2, bound=None))
    for text in ("(3, 5, 2)", "depth=1", "hidden=(4, 4, 4)", "modes=2", "bound=None"):
        assert text in shown


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dims": ()}, ValueError, "dims: expected a positive width"),
        ({"dims": (3, 0)}, ValueError, "dims: expected a positive width"),
        ({"dims": (3, "5")}, TypeError, "dims: expected integers"),
        (
            {"dims": 3},
            TypeError,
            "dims: expected a sequence of widths or a mapping by name, got int",
        ),
        ({"dims": {1: 3}}, TypeError, "dims: expected names that are non-empty strings"),
        ({"in_features": 0}, ValueError, "in_features: expected an integer of at least 1, got 0"),
        ({"depth": -1}, ValueError, "depth: expected an integer of at least 0, got -1"),
        ({"depth": 1}, ValueError, "hidden_features: expected a positive width or ratio"),
        ({"depth": 1, "hidden_features": 0.0}, ValueError, "hidden_features: expected a positive"),
        ({"hidden_features": 8}, ValueError, "hidden_features: expected None with depth=0"),
        ({"modes": 0}, ValueError, "modes: expected an integer of at least 1, got 0"),
        ({"activation": "mish"}, ValueError, "activation: expected one of relu, gelu, silu, tanh"),
        ({"bound": 0.0}, ValueError, "bound: expected None or a positive finite number"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit(settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        GaussianHeads(**({"in_features": H, "dims": DIMS} | settings))


@pytest.mark.parametrize("depth", [0, 1])
def test_arguments_that_do_not_fit(depth):
    heads = GaussianHeads(H, DIMS, depth=depth, hidden_features=4 if depth else None)
    named = GaussianHeads(H, NAMED, depth=depth, hidden_features=4 if depth else None)
    student, target = torch.randn(N, H), torch.randn(N, 10)
    parts = list(target.split(list(DIMS), -1))
    by_name = dict(zip(NAMED, parts, strict=True))

    def fails(error, message, call):
        with pytest.raises(error, match=re.escape(message)):
            call()

    fails(ValueError, "student: expected shape (6, 7)", lambda: heads(torch.randn(N, 8), target))
    fails(TypeError, "student: expected a floating", lambda: heads(student.long(), target))
    fails(ValueError, "target: expected shape (6, 10)", lambda: heads(student, target[:, 1:]))
    fails(TypeError, "target: expected a tensor, got str", lambda: heads(student, "target"))
    fails(ValueError, "target: expected 3 tensors", lambda: heads(student, parts[:2]))
    fails(ValueError, "target[1]: expected shape (6, 5)", lambda: heads(student, parts[:1] * 3))
    fails(TypeError, "target: expected no mapping", lambda: heads(student, by_name))
    fails(ValueError, "got none for cnn", lambda: named(student, {"pca": parts[2]}))
    fails(ValueError, "got one for x", lambda: named(student, by_name | {"x": parts[0]}))
    fails(ValueError, "does not require grad", lambda: heads(student, target.requires_grad_()))


def test_widths_may_be_numpy_integers():
    heads = GaussianHeads(4, tuple(np.array([3, 5])))
    assert heads(torch.zeros(2, 4), torch.zeros(2, 8)).shape == ()


def test_a_missing_first_teacher_is_named():
    heads = GaussianHeads(4, (3, 5))
    with pytest.raises(TypeError, match=r"target\[0\]: expected a tensor, got NoneType"):
        heads(torch.zeros(2, 4), [None, torch.zeros(2, 5)])
