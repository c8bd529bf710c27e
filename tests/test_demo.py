"""The demonstration's parts at tiny settings."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from safetensors.torch import load_file

from mtkd.demo.__main__ import main
from mtkd.demo.experiment import Outcome
from mtkd.demo.probes import PROBES, ink_shape, probe
from mtkd.demo.report import TITLES, collect, spread, table, verdict
from mtkd.demo.students import LOSSES, make_heads, student
from mtkd.demo.teachers import TEACHERS


def stroke(*pixels):
    image = np.zeros((8, 8))
    image[tuple(zip(*pixels, strict=True))] = 1
    return image.reshape(1, 64)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ([(3, x) for x in range(8)], (1, 0)),
        ([(y, 5) for y in range(2, 7)], (-1, 0)),
        ([(i, i) for i in range(8)], (0, 1)),
        ([(i, 7 - i) for i in range(8)], (0, -1)),
        ([(2, 2), (2, 5), (5, 2), (5, 5)], (0, 0)),
    ],
    ids=["horizontal", "vertical", "diagonal", "antidiagonal", "square"],
)
def test_ink_shape(pixels, expected):
    np.testing.assert_allclose(ink_shape(stroke(*pixels))[0], expected, atol=1e-12)


def test_ink_shape_ignores_brightness_and_position():
    image = stroke((1, 1), (2, 1), (2, 2))
    moved = np.roll(image.reshape(8, 8), (3, 2), (0, 1)).reshape(1, 64)
    np.testing.assert_allclose(ink_shape(moved * 0.3), ink_shape(image), atol=1e-12)


@pytest.mark.parametrize("informed", [True, False])
def test_probe(informed):
    generator = np.random.default_rng(0)
    labels = np.arange(600) % 10
    embeddings = generator.normal(size=(600, 12))
    shapes = embeddings[:, :2] @ generator.normal(size=(2, 2))
    if informed:
        embeddings[:, 2:] += 20 * np.eye(10)[labels]
    else:
        shapes = generator.normal(size=(600, 2))
    split = [(a[:300], a[300:]) for a in (embeddings, labels, shapes)]
    scores = probe(*split[0], split[1], split[2], seed=0)
    assert scores.keys() == PROBES.keys()
    if informed:
        assert min(scores.values()) > 0.95
    else:
        assert max(scores.values()) < 0.25


@pytest.mark.parametrize("loss", LOSSES)
def test_heads_have_the_same_capacity(loss):
    dims = [9, 64, 256]
    count = [sum(p.numel() for p in make_heads(k, 32, dims).parameters()) for k in LOSSES]
    assert max(count) <= 1.01 * min(count)
    heads = make_heads(loss, 32, dims)
    value = heads(torch.randn(5, 32), torch.randn(5, sum(dims)))
    assert value.shape == ()
    value.backward()
    assert all(p.grad is not None for p in heads.parameters())


def outcome(**changes):
    rows = {name: dict.fromkeys(PROBES, 0.5) for name in [*TEACHERS, *TITLES]}
    for name, change in changes.items():
        rows[name] |= change
    return Outcome(scores=rows)


def test_verdict_says_where_the_gaussian_loss_loses():
    gaps = [(0.19, 0.03), (0.21, -0.02)]  # beyond two standard errors on knn, within on linear
    outcomes = [outcome(mse={"knn": 0.5 + a, "linear": 0.5 + b}) for a, b in gaps]
    ahead, behind, equal = verdict(collect(outcomes)).splitlines()[1:4]
    assert ahead == "  ahead on nothing;"
    assert "linear against mse (-0.005 ± 0.025), knn against mse (-0.200 ± 0.010, clear)" in behind
    assert "nmi against cosine (+0.000 ± 0.000)" in equal


def test_one_seed_has_no_spread():
    scores = collect([outcome(cosine={"nmi": 0.2})])
    assert spread(scores["gaussian"]["nmi"]) is None
    assert "±" not in table(scores, dict.fromkeys(TEACHERS, 9), 32)
    text = verdict(scores)
    assert "one seed, so none of this is evidence" in text
    assert "ahead on nmi against cosine (+0.300)" in text


def test_quick_run_writes_everything(tmp_path, capsys):
    main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(results["teacher_widths"]) >= 8
    assert results["scores"].keys() == {*TEACHERS, *TITLES}
    assert results["verdict"] in printed
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    student().load_state_dict(load_file(tmp_path / "student.safetensors"))
