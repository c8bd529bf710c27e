"""Real text that is on the machine: passages of documentation, labelled by their subject.

Docstrings of libraries that come with this demonstration, and of Python itself, read from their
source without importing it. The versions installed here decide what the passages are.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...evaluation.checks import Array

SUBJECTS = {
    "purelib": (
        "matplotlib/axes",
        "networkx/generators",
        "numpy/lib",
        "scipy/interpolate",
        "sklearn/ensemble",
        "sympy/geometry",
        "matplotlib/backends",
        "networkx/algorithms",
        "scipy/optimize",
        "scipy/signal",
        "scipy/sparse",
        "scipy/stats",
        "sklearn/linear_model",
        "sympy/combinatorics",
        "sympy/physics",
        "sympy/solvers",
        "torch/distributed",
        "torch/distributions",
        "torch/nn",
    ),
    "stdlib": ("asyncio", "email", "logging", "tkinter", "unittest"),
}
_SHORTEST, _LONGEST = 60, 400  # characters of a passage
_CODE = re.compile(r">>>|::|^\s*[-=~.*|+]{3,}|^\s*\S+ : |\\[a-z]+\{|:math:", re.MULTILINE)


@dataclass(frozen=True)
class Passage:
    """A paragraph of a docstring: its text, its subject, and the object that it is about."""

    text: str
    subject: str
    module: str
    name: str

    @property
    def held_out(self) -> bool:
        """Whether it is for scoring alone; one docstring is never on both sides."""
        return zlib.crc32(f"{self.module}.{self.name}".encode()) % 4 == 0


def read_corpus(most: int, subjects: int | None = None) -> list[Passage]:
    """Return at most so many passages of each of so many subjects, the same every time."""
    passages = []
    for base, subject in [(b, s) for b, each in SUBJECTS.items() for s in each][:subjects]:
        passages += _some(_passages(Path(sysconfig.get_paths()[base]), subject), most)
    return passages


def graded_pairs(passages: list[Passage], seed: int = 0) -> tuple[Array, Array, Array]:
    """Return pairs of passages by index, and how near they are.

    2: of one docstring; 1: of one subject; 0: of different subjects. As many of each.
    """
    random = np.random.default_rng(seed)
    objects = np.array([f"{p.module}.{p.name}" for p in passages])
    subjects = np.array([p.subject for p in passages])
    first = np.flatnonzero(objects[:-1] == objects[1:])
    others = np.arange(len(passages))
    columns: list[tuple[Array, Array]] = [(first, first + 1)]
    for same in (True, False):
        fit = [others[((subjects == subjects[i]) == same) & (objects != objects[i])] for i in first]
        columns.append((first, np.array([random.choice(each) for each in fit], dtype=int)))
    left, right = (np.concatenate(side) for side in zip(*columns, strict=True))
    return left, right, np.repeat([2, 1, 0], len(first))


def _some(passages: Iterator[Passage], most: int) -> list[Passage]:
    """Passages of some docstrings chosen by the hash of their names, in order of the names."""
    unique = {passage.text: passage for passage in passages}.values()
    by_object: dict[tuple[str, str], list[Passage]] = {}
    for passage in unique:
        by_object.setdefault((passage.module, passage.name), []).append(passage)
    chosen: list[Passage] = []
    for key in sorted(by_object, key=lambda key: (zlib.crc32(".".join(key).encode()[::-1]), key)):
        chosen += by_object[key]
    return sorted(chosen[:most], key=lambda passage: (passage.module, passage.name))


def _passages(root: Path, subject: str) -> Iterator[Passage]:
    for file in sorted((root / subject).rglob("*.py")):
        inside = file.relative_to(root).with_suffix("")
        if any(part.lstrip("_").startswith("test") for part in inside.parts):
            continue
        module = ".".join(part for part in inside.parts if part != "__init__")
        for name, text in _docstrings(file):
            for paragraph in re.split(r"\n\s*\n", text)[:4]:
                plain = " ".join(paragraph.split())
                if _SHORTEST <= len(plain) <= _LONGEST and not _CODE.search(paragraph):
                    yield Passage(plain, subject, module, name)


def _docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """Yield names and docstrings of a module, of its classes and functions."""
    nodes: list[ast.AST] = [ast.parse(file.read_bytes())]
    while nodes:  # into classes, not into functions: much less to look at than ast.walk
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node):
                yield getattr(node, "name", file.stem), text
            if isinstance(node, (ast.Module, ast.ClassDef)):
                nodes += reversed(node.body)
