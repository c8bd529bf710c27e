"""Who may import whom, as docs/design.md draws it."""

import ast
import sys
from pathlib import Path

import pytest

import mtkd

ROOT = Path(mtkd.__file__).parent

ALLOWED = {
    "integrations": {"distributed", "nn", "packing", "reduction"},
    "distributed": {"nn", "functional", "packing", "reduction"},
    "demo": {"nn", "functional", "packing", "evaluation", "teachers", "trainer"},
    "evaluation": {"packing"},
    "trainer": {"nn", "distributed", "reduction", "information", "_durable", "_signature"},
    "teachers": {"packing", "_durable", "_signature"},
    "nn": {"functional", "packing", "reduction", "reference"},
    "functional": {"packing", "reduction", "linear", "ops", "reference"},
    "linear": {"plan", "ops", "packing", "dispatch", "reference"},
    "ops": {"dispatch", "reference", "triton", "_C"},
    "reference": set(),
    "dispatch": set(),
    "packing": set(),
    "plan": set(),
    "reduction": {"dispatch"},
    "weighting": {"reduction"},
    "information": set(),
    "_durable": set(),
    "_signature": set(),
    "triton": set(),
}
KERNEL_PACKAGE = {"functional", "linear", "ops", "dispatch", "reference", "packing", "plan"}
KERNEL_PACKAGE |= {"reduction", "triton", "weighting"}
LIBRARIES = {"torch", "einops"} | set(sys.stdlib_module_names)
FREE = {"__init__", "__main__", "testing"}  # rooms outside the drawing


def libraries(own):
    """What a room of the kernel package may import from outside."""
    if own in {"reference", "dispatch", "weighting"}:
        return LIBRARIES - {"einops"}
    return LIBRARIES | {"triton"} if own == "triton" else LIBRARIES


def room(file, root=ROOT):
    """The top-level room of a file: the folder or module under mtkd."""
    return file.relative_to(root).parts[0].removesuffix(".py")


def imports(file, root=ROOT):
    """Yield (line, room or None, outside library or None) of every import in a file."""
    depth = len(file.relative_to(root).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, None, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, None, node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield node.lineno, name.split(".")[0], None


def violations(root=ROOT):
    for file in sorted(root.rglob("*.py")):
        own = room(file, root)
        for line, other, library in imports(file, root):
            where = f"{file.relative_to(root)}:{line}"
            if own in ALLOWED and other is not None and other not in ALLOWED[own] | {own}:
                yield f"{where} {own} may not import {other}"
            if own in KERNEL_PACKAGE and library is not None and library not in libraries(own):
                yield f"{where} {own} may not import {library}"


def test_imports_follow_the_arrows():
    assert list(violations()) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("reduction.py", "import torch\nfrom . import linear", "2 reduction may not import linear"),
        ("functional/x.py", "from ..dispatch import y", "1 functional may not import dispatch"),
        ("plan.py", "import numpy as np", "1 plan may not import numpy"),
        ("ops.py", "def f():\n    import triton.language", "2 ops may not import triton"),
        ("reference/x.py", "from einops import rearrange", "1 reference may not import einops"),
        ("linear/x.py", "from mtkd.plan import tiles", "1 linear may not import mtkd"),
    ],
)
def test_a_violation_is_named_with_its_line(tmp_path, file, text, expected):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert list(violations(tmp_path)) == [f"{file}:{expected}"]


def test_every_room_is_in_the_drawing():
    rooms = {room(file) for file in ROOT.rglob("*.py")}
    assert rooms - FREE <= set(ALLOWED)


def test_compiled_kernels_are_loaded_in_one_place():
    def names(file):
        nodes = ast.walk(ast.parse(file.read_text()))
        return {node.value for node in nodes if isinstance(node, ast.Constant)}

    assert [f.name for f in ROOT.rglob("*.py") if "._C" in names(f)] == ["ops.py"]


def test_the_rule_sees_imports():
    found = {(room(f), other) for f in ROOT.rglob("*.py") for _, other, _ in imports(f)}
    assert {("functional", "ops"), ("linear", "plan"), ("nn", "functional")} <= found


def test_every_room_of_losses_has_its_stems():
    def stems(folder):
        return {file.stem for file in (ROOT / folder).glob("*.py")} - {"__init__"}

    # a shifted loss is an alignment loss of other rows: it has no formula of its own
    assert stems("reference") - {"columns"} == stems("functional") - {"checks", "shifted"}
