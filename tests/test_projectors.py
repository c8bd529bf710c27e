"""Projectors and the ladder beside per-teacher loops; what is kept for backward; state dicts."""

import copy
import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import mtkd.functional as F
from mtkd.nn import GaussianHeads, Ladder, Projectors, TokenProjectors, student_state_dict

H, B = 6, 3
RAGGED, EQUAL = (7, 1, 4), (5, 5, 5)
NAMED = {"cnn": 7, "vit_b16.in21k": 1, "pca": 4}
ACTIVATIONS = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
CONFIGS = {
    "linear": {},
    "linear norm no bias": {"norm": True, "bias": False},
    "one layer": {"depth": 1, "hidden_features": 4},
    "ratio": {"depth": 2, "hidden_features": 1.4, "activation": "tanh"},
    "three layers": {"depth": 3, "hidden_features": 4, "activation": "silu"},
    "no bias": {"depth": 2, "hidden_features": 4, "bias": False, "activation": "relu"},
    "norm": {"depth": 2, "hidden_features": 4, "norm": True},
    "ratio norm": {"depth": 2, "hidden_features": 1.4, "norm": True},
}
all_dims = pytest.mark.parametrize("dims", [RAGGED, EQUAL, (3,), NAMED], ids=str)
all_leading = pytest.mark.parametrize("leading", [(8,), (2, 3), (), (0,), (2, 0, 3)], ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def moved(module):
    """A float64 module with every parameter off its initial value."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def ladder(dims=RAGGED, recompute=False):
    return moved(Ladder(H, dims, B, 4, 9, recompute=recompute))


def encoder(leading=(8,), dtype=torch.float64):
    return [torch.randn(*leading, H, dtype=dtype, requires_grad=True) for _ in range(B)]


class Plain:
    """A loop of teachers whose parameters are their entries of a state dict, as leaves."""

    def __init__(self, module):
        self.module = module
        self.state = {k: x.clone().requires_grad_() for k, x in module.state_dict().items()}

    def linear(self, name, x):
        return functional.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def normalised(self, name, x):
        if not self.module.norm:
            return x
        affine = self.state.get(f"{name}.weight"), self.state.get(f"{name}.bias")
        return functional.layer_norm(x, x.shape[-1:], *affine)

    def projectors(self, x):
        depth, activate = self.module.depth, ACTIVATIONS[self.module.activation]
        columns = []
        for name in self.module.teachers.names:
            prefix, y = f"teachers.{name}", x
            for layer in range(depth):
                y = self.normalised(f"{prefix}.norm.{layer}", y)
                y = activate(self.linear(f"{prefix}.hidden.{layer}", y))
            y = self.normalised(f"{prefix}.norm.{depth}", y)
            columns.append(self.linear(f"{prefix}.last", y))
        return torch.cat(columns, -1)

    def ladder(self, input):
        columns = []
        for name in self.module.teachers.names:
            total = self.state[f"teachers.{name}.bias"]
            for block, x in enumerate(input):
                prefix = f"teachers.{name}.blocks.{block}"
                hidden = functional.gelu(self.linear(f"{prefix}.hidden", x))
                total = total + self.linear(f"{prefix}.last", hidden)
            columns.append(total)
        return torch.cat(columns, -1)

    def assert_same_gradients(self):
        for piece in self.module.pieces():
            grad = self.module.get_parameter(piece.parameter).grad[piece.where]
            torch.testing.assert_close(grad, self.state[piece.name].grad)


@all_dims
@all_leading
def test_projectors_are_those_of_plain_teachers(config, dims, leading):
    module = moved(Projectors(H, dims, **config))
    plain = Plain(module)
    x = torch.randn(*leading, H, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = module(x), plain.projectors(y)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(expected)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)
    plain.assert_same_gradients()


@pytest.mark.parametrize("recompute", [False, True])
@all_dims
@all_leading
def test_ladder_is_that_of_plain_teachers(dims, leading, recompute):
    module, input = ladder(dims, recompute), encoder(leading)
    plain, others = Plain(module), [x.detach().clone().requires_grad_() for x in input]
    out, expected = module(input), plain.ladder(others)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(expected)
    out.backward(upstream)
    expected.backward(upstream)
    for x, other in zip(input, others, strict=True):
        torch.testing.assert_close(x.grad, other.grad)
    plain.assert_same_gradients()


@pytest.mark.parametrize("bias", [False, True])
def test_small_teachers_take_one_batched_product(bias, monkeypatch):
    module = moved(Projectors(H, EQUAL, hidden_features=4, depth=2, bias=bias))
    x = torch.randn(8, H, dtype=torch.float64)
    tensors, calls = [x.requires_grad_(), *module.parameters()], []
    results = []
    for largest in (4 * 8, 5 * 8):  # of 3 products, with 8 rows of 4, 5 and 6 numbers
        monkeypatch.setattr("mtkd.nn.mlp.LARGEST", largest)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            out = module(x)
        names = [event.name for event in profiler.events()]
        calls.append(names.count("aten::baddbmm" if bias else "aten::bmm"))
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert calls == [1, 2]
    for batched, separate in zip(*results, strict=True):
        torch.testing.assert_close(batched, separate)


@pytest.mark.parametrize("dims", [RAGGED, EQUAL], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputing_changes_no_bit(dims, autocast):
    results = []
    module, input = ladder(dims).float(), encoder((16,), torch.float32)
    for recompute in (False, True):
        module.recompute = recompute
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(input)
        grads = torch.autograd.grad(out.square().sum(), [*input, *module.parameters()])
        results.append([out.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].dtype == torch.float32


def test_derivatives_of_the_second_order_are_exact():
    for recompute, dims in itertools.product((False, True), ((2, 1), (2, 2))):
        module = moved(Ladder(3, dims, 2, 2, 3, recompute=recompute))
        input = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        assert torch.autograd.gradcheck(lambda *x, m=module: m(x), input)
        assert torch.autograd.gradgradcheck(lambda *x, m=module: m(x), input)


def kept(module, input):
    """Bytes that autograd saves in forward, less parameters and inputs; and all that stay."""
    tensors = [*input, *module.parameters()]
    known = {x.untyped_storage().data_ptr() for x in tensors}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(input)
    by_hooks = sum(saved.values())
    del out
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = module(input)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    return by_hooks, allocated - out.untyped_storage().nbytes()


@pytest.mark.parametrize("dims", [RAGGED, EQUAL], ids=str)
def test_what_is_kept_for_backward(dims):
    rows, teachers, units = 64, len(dims), 4 + 4 + 9
    input = encoder((rows,), torch.float32)
    assert kept(ladder(dims).float(), input) == (4 * rows * teachers * units,) * 2
    assert kept(ladder(dims, recompute=True).float(), input) == (0, 0)


def test_tokens_are_not_copied_for_backward():
    module = TokenProjectors(ladder(recompute=True), ladder(recompute=True), registers=2).float()
    assert kept(module, encoder((4, 1 + 2 + 16), torch.float32)) == (0, 0)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_tokens_have_their_own_ladders(registers, leading):
    cls, patch = ladder(), ladder()
    module, input = TokenProjectors(cls, patch, registers), encoder((*leading, 1 + registers + 5))
    out = module(input)
    assert out.shape == (*leading, 6, sum(RAGGED))
    first = Plain(cls).ladder([x[..., 0, :] for x in input])
    others = Plain(patch).ladder([x[..., 1 + registers :, :] for x in input])
    torch.testing.assert_close(out[..., 0, :], first)
    torch.testing.assert_close(out[..., 1:, :], others)
    linear = TokenProjectors(*(moved(Projectors(H, RAGGED)) for _ in range(2)), registers)
    torch.testing.assert_close(linear(input[0])[..., 0, :], linear.cls(input[0][..., 0, :]))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dims", [RAGGED, EQUAL], ids=str)
def test_every_subset_of_gradients_flows(dims, recompute):
    module, input = ladder(dims, recompute), encoder()
    tensors = {**dict(module.named_parameters()), **{str(b): x for b, x in enumerate(input)}}
    upstream = torch.randn(8, sum(dims), dtype=torch.float64)
    grads = torch.autograd.grad(module(input), list(tensors.values()), upstream)
    expected = dict(zip(tensors, grads, strict=True))
    groups = [
        ["0"],
        ["1", "2"],
        ["bias"],
        ["hidden_0_weight"],
        ["last_1_weight", "2"],
        ["hidden_2_bias"],
    ]
    for wanted in [*groups, [n for n in tensors if len(n) > 1], ["0", "1", "2"]]:
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in wanted)
        grads = torch.autograd.grad(module(input), [tensors[name] for name in wanted], upstream)
        for name, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(grad, expected[name])
    for tensor in tensors.values():
        tensor.requires_grad_(False)
    assert not module(input).requires_grad


def test_no_input_is_changed_and_no_graph_is_made_without_grad():
    module, input = ladder(EQUAL, recompute=True), encoder()
    before = copy.deepcopy([*input, *module.parameters()])
    with torch.no_grad():
        first = module(input)
    torch.testing.assert_close(first, module(input).detach())
    after = [*input, *module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@all_dims
def test_the_fused_last_layer_equals_the_loss_of_the_predictions(config, dims):
    module = moved(Projectors(H, dims, **config))
    widths = module.teachers.dims
    student = torch.randn(2, 4, H, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 4, sum(widths), dtype=torch.float64)
    shift, scale = torch.randn(sum(widths)).double(), torch.rand(sum(widths)).double()
    options = {"cosine": 0.7, "mse": 0.2, "shift": shift, "scale": scale}
    options["mask"] = torch.rand(2, 4, len(widths)) < 0.7
    given = [target, target.split(list(widths), -1)]
    if isinstance(dims, dict):
        given.append(dict(zip(dims, given[1], strict=True)))
    expected = F.alignment(module(student), target, widths, **options)
    tensors = [student, *module.parameters()]
    grads = torch.autograd.grad(expected, tensors)
    for form in given:
        loss = module.alignment(student, form, **options)
        torch.testing.assert_close(loss, expected)
        for grad, wanted in zip(torch.autograd.grad(loss, tensors), grads, strict=True):
            torch.testing.assert_close(grad, wanted)
    matrix = module.alignment(student, target, reduction="none")
    assert matrix.shape == (2, 4, len(widths))


def test_autocast_and_bfloat16_stay_near_float32(config):
    module = moved(Projectors(H, EQUAL, **config)).float()
    student = torch.randn(8, H)
    expected = module(student)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(student)
        loss = module.alignment(student, torch.randn(8, 15))
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)  # 8 bits a layer
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    out = module.bfloat16()(student.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("recompute", [False, True])
def test_ladder_compiles_without_a_graph_break(recompute):
    module, input = ladder(EQUAL, recompute), encoder()
    expected = module(input).square().sum()
    step = torch.compile(lambda x: module(x).square().sum(), backend="aot_eager", fullgraph=True)
    compiled = step(input)
    torch.testing.assert_close(compiled, expected)
    tensors = [*input, *module.parameters()]
    wanted = torch.autograd.grad(expected, tensors)
    for grad, other in zip(torch.autograd.grad(compiled, tensors), wanted, strict=True):
        torch.testing.assert_close(grad, other)


def test_weights_start_as_unics_or_as_torchs():
    module = Ladder(64, (32, 48), 2, 50, 60)
    for name, parameter in module.named_parameters():
        if name.endswith("weight"):
            assert abs(parameter.std().item() / 0.02 - 1) < 0.05
            assert abs(parameter.mean().item()) < 0.002
        else:
            assert not parameter.any()
    assert module.hidden == (50, 60)
    assert Ladder(4, (3,), 3).hidden == (768, 768, 3072)
    for piece in (state := Projectors(100, (50, 60), hidden_features=64, depth=2).state_dict()):
        limit = (64 if ".hidden.0" not in piece else 100) ** -0.5
        assert 0.9 * limit < state[piece].abs().max() <= limit


def both(dims):
    return {
        "ladder": lambda: ladder(dims),
        "equal hidden": lambda: moved(Projectors(H, dims, **CONFIGS["norm"])),
        "ratio": lambda: moved(Projectors(H, dims, **CONFIGS["ratio"])),
        "linear": lambda: moved(Projectors(H, dims)),
    }


@pytest.mark.parametrize("kind", both(NAMED))
def test_state_dict_round_trip_by_name_inside_a_model(kind):
    saved = nn.ModuleDict({"projectors": both(NAMED)[kind]()})
    shuffled = {name: NAMED[name] for name in reversed(NAMED)}
    loaded = nn.ModuleDict({"projectors": both(shuffled)[kind]()})
    loaded.load_state_dict(saved.state_dict())
    input = encoder() if kind == "ladder" else encoder()[0]
    columns = saved["projectors"](input).split(list(NAMED.values()), -1)
    torch.testing.assert_close(loaded["projectors"](input), torch.cat(columns[::-1], -1))
    with torch.device("meta"):
        empty = nn.ModuleDict({"projectors": both(NAMED)[kind]().float()})
    empty.load_state_dict(saved.state_dict(), assign=True)
    torch.testing.assert_close(empty["projectors"](input), saved["projectors"](input))


@pytest.mark.parametrize("kind", both(NAMED))
def test_pieces_cover_every_parameter_once(kind):
    module = both(NAMED)[kind]()
    covered = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for _, parameter, where in module.pieces():
        covered[parameter][where] += 1
    assert all((count == 1).all() for count in covered.values())
    assert len(module.state_dict()) == len(list(module.pieces()))


def test_state_dict_names():
    kinds = ("hidden.weight", "hidden.bias", "last.weight")
    expected = {f"teachers.{n}.blocks.{b}.{k}" for n in NAMED for b in range(B) for k in kinds}
    assert set(ladder(NAMED).state_dict()) == expected | {f"teachers.{n}.bias" for n in NAMED}
    layers = {f"{x}.{k}" for x in ("hidden.0", "hidden.1", "last") for k in ("weight", "bias")}
    module = Projectors(H, RAGGED, depth=2, hidden_features=4)
    assert set(module.state_dict()) == {f"teachers.{t}.{x}" for t in range(3) for x in layers}
    assert module.state_dict()["teachers.2.last.weight"].shape == (4, 4)


class Student(nn.Module):
    """A model with expendable parts at several depths, and parameters that they share."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(H, H), nn.BatchNorm1d(H))
        self.heads = nn.ModuleDict({"gaussian": GaussianHeads(H, RAGGED), "out": nn.Linear(H, 2)})
        self.tokens = TokenProjectors(Ladder(H, RAGGED, 2), Projectors(H, RAGGED))
        self.projectors = Projectors(H, EQUAL)
        self.shared = nn.Linear(H, H)
        self.projectors.child, self.alias = self.shared, self.projectors
        self.tied = nn.Linear(H, sum(EQUAL), bias=False)
        self.tied.weight = self.projectors.last_0_weight


STUDENT = {f"encoder.{x}" for x in ("0.weight", "0.bias", "1.weight", "1.bias")}
STUDENT |= {f"encoder.1.{x}" for x in ("running_mean", "running_var", "num_batches_tracked")}
STUDENT |= {"heads.out.weight", "heads.out.bias", "shared.weight", "shared.bias", "tied.weight"}


def test_student_state_dict_leaves_expendable_parts_out():
    model = Student()
    before = set(model.state_dict())
    state = student_state_dict(model)
    assert set(state) == STUDENT
    assert state["tied.weight"] is not None
    assert state["encoder.0.weight"].data_ptr() == model.encoder[0].weight.data_ptr()
    assert set(model.state_dict()) == before
    assert before > STUDENT
    bare = Student()
    bare.load_state_dict(state, strict=False)
    assert torch.equal(bare.encoder[0].weight, model.encoder[0].weight)


def test_student_state_dict_keeps_wrappers_prefixes():
    wrapped = nn.Module()
    wrapped.module = Student()
    assert set(student_state_dict(wrapped)) == {f"module.{name}" for name in STUDENT}
    compiled = torch.compile(Student())
    assert set(student_state_dict(compiled)) == {f"_orig_mod.{name}" for name in STUDENT}
    assert student_state_dict(Projectors(H, RAGGED)) == {}
    mine = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    mine[1].expendable = True
    assert set(student_state_dict(mine)) == {"0.weight", "0.bias"}


def test_student_state_dict_restores_hooks_after_an_error():
    def fail(*_):
        raise RuntimeError("full disk")

    model = nn.Sequential(Projectors(H, RAGGED), nn.Linear(2, 2))
    hook = model.register_state_dict_post_hook(fail)
    with pytest.raises(RuntimeError, match="full disk"):
        student_state_dict(model)
    hook.remove()
    assert "0.teachers.0.last.weight" in model.state_dict()


def test_repr_names_the_teachers():
    assert "'pca': 4" in repr(ladder(NAMED))
    assert "hidden=(4, 4, 9), recompute=False" in repr(ladder())
    shown = repr(Projectors(H, RAGGED, depth=1, hidden_features=4))
    assert "6, (7, 1, 4), hidden=(4, 4, 4), activation='gelu', depth=1, norm=False" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": ()}, "dims: expected a positive width"),
        ({"dims": (3, 0)}, "dims: expected a positive width"),
        ({"in_features": 0}, "in_features: expected an integer of at least 1, got 0"),
        ({"blocks": 0}, "blocks: expected an integer of at least 1, got 0"),
        ({"hidden_features": 0}, "hidden_features: expected an integer of at least 1, got 0"),
        ({"last_hidden_features": 1.5}, "last_hidden_features: expected an integer"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Ladder(**({"in_features": H, "dims": RAGGED, "blocks": B} | settings))


def test_arguments_that_do_not_fit():
    module, x = Ladder(H, RAGGED, B, 4, 9), torch.randn(8, H)
    tokens = TokenProjectors(Projectors(H, RAGGED), Projectors(H, RAGGED), registers=2)

    def fails(error, message, call):
        with pytest.raises(error, match=re.escape(message)):
            call()

    fails(ValueError, "input: expected 3 tensors, one a block, got 2", lambda: module([x, x]))
    fails(TypeError, "input: expected a sequence of tensors, one a", lambda: module(x))
    wide = torch.randn(8, H + 1)
    message = "input[1]: expected shape (8, 6), got shape (8, 7)"
    fails(ValueError, message, lambda: module([x, wide, x]))
    message = "input[2]: expected shape (8, 6), got shape (7, 6)"
    fails(ValueError, message, lambda: module([x, x, x[1:]]))
    fails(TypeError, "input[0]: expected a floating-point tensor", lambda: module([x.long()] * 3))
    fails(ValueError, "input[1]: expected device cpu", lambda: module([x, x.to("meta"), x]))
    projectors = Projectors(H, RAGGED, depth=1, hidden_features=4)
    fails(ValueError, "student: expected shape (8, 6)", lambda: projectors(wide))
    fails(TypeError, "student: expected a tensor, got list", lambda: projectors([x]))
    fails(
        ValueError, "hidden_features: expected None", lambda: Projectors(H, (3,), hidden_features=4)
    )
    message = "input: expected shape (*, L, H) with at least 3 tokens, got shape (2, 6)"
    fails(ValueError, message, lambda: tokens(x[:2]))
    fails(ValueError, "registers: expected an integer", lambda: TokenProjectors(module, module, -1))
