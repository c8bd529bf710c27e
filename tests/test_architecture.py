"""Who may import whom, as docs/design.md draws it."""

import ast
import sys
from pathlib import Path

import mtkd

ROOT = Path(mtkd.__file__).parent

ALLOWED = {
    "demo": {"nn", "functional", "packing"},
    "trainer": {"nn", "functional", "reduction", "packing", "teachers"},
    "teachers": {"packing"},
    "nn": {"functional", "packing", "reference"},
    "functional": {"packing", "reduction", "linear", "ops", "reference"},
    "linear": {"plan", "ops", "packing", "dispatch", "reference"},
    "ops": {"dispatch", "reference", "triton", "_C"},
    "reference": set(),
    "dispatch": set(),
    "packing": set(),
    "plan": set(),
    "reduction": set(),
    "triton": set(),
}
KERNEL_PACKAGE = {"functional", "linear", "ops", "dispatch", "reference", "packing", "plan"}
KERNEL_PACKAGE |= {"reduction", "triton"}
LIBRARIES = {"torch", "triton", "einops"} | set(sys.stdlib_module_names)


def room(file):
    """The top-level room of a file: the folder or module under mtkd."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file):
    """Yield (line, room or None, outside library or None) of every import in a file."""
    depth = len(file.relative_to(ROOT).parts)
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


def violations():
    for file in sorted(ROOT.rglob("*.py")):
        own = room(file)
        for line, other, library in imports(file):
            where = f"{file.relative_to(ROOT)}:{line}"
            if own in ALLOWED and other is not None and other not in ALLOWED[own] | {own}:
                yield f"{where} {own} may not import {other}"
            if own in KERNEL_PACKAGE and library is not None and library not in LIBRARIES:
                yield f"{where} {own} may not import {library}"


def test_imports_follow_the_arrows():
    assert list(violations()) == []


def test_the_rule_sees_imports():
    found = {(room(f), other) for f in ROOT.rglob("*.py") for _, other, _ in imports(f)}
    assert {("functional", "ops"), ("linear", "plan"), ("nn", "functional")} <= found


def test_every_room_of_losses_has_its_stems():
    def stems(folder):
        return {file.stem for file in (ROOT / folder).glob("*.py")} - {"__init__"}

    assert stems("reference") - {"columns"} == stems("functional") - {"checks"}
