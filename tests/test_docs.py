"""What the documentation shows runs, and what it points to exists."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mtkd

ROOT = Path(mtkd.__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
MODULES = [
    module.name
    for module in pkgutil.walk_packages(mtkd.__path__, "mtkd.")
    if not module.name.endswith(("__main__", "._C")) and ".demo" not in module.name
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


WITH_EXAMPLES = [
    "README.md",
    "docs/classification.md",
    "docs/evaluation.md",
    "docs/tutorial-text.md",
    "docs/projectors.md",
    "docs/teachers.md",
    "docs/training.md",
    "docs/weighting.md",
    *sorted(ROOT.glob("docs/losses/*.md")),
]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: Path(page).name)
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name), verbose=False)
    assert results.failed == 0


@pytest.mark.parametrize(
    "public",
    [
        "functional.gaussian_nll",
        "functional.linear_gaussian_nll",
        "functional.alignment",
        "functional.linear_alignment",
        "functional.consensus",
        "functional.kl_div",
        "functional.linear_kl_div",
        "functional.majority_vote",
        "functional.mixture_kl",
        "functional.dirichlet_mixture",
        "weighting.teacher_dropping",
        "weighting.confidence_weights",
        "weighting.gradient_weights",
        "weighting.top_k_routing",
        "nn.GaussianHeads",
        "nn.Ladder",
        "nn.Projectors",
        "nn.TokenProjectors",
    ],
)
def test_public_docstrings_have_every_section(public):
    module, name = public.rsplit(".", 1)
    text = getattr(importlib.import_module(f"mtkd.{module}"), name).__doc__
    for section in ("Args:", "Shape:", "Raises:", "Note:", "Source:", "Example:", "Returns"):
        assert section in text
