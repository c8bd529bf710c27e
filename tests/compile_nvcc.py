"""CUDA C++ for the compile check: every file, by nvcc, against the installed torch's headers."""

import hashlib
import os
import runpy
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compile_resources import Resources, kept, of_nvidia
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("80", "90a", "100")


def find_nvcc() -> str | None:
    """The compiler in CUDA_HOME; without that, on the PATH or where CUDA installs itself."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def flags() -> list[str]:
    """How setup.py and PyTorch compile a .cu file, for the architectures checked."""
    with (
        mock.patch("setuptools.setup"),
        mock.patch("builtins.print"),
        mock.patch.dict(os.environ, MTKD_NO_EXTENSION="1"),
    ):
        setup: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
    return [
        *cpp_extension.COMMON_NVCC_FLAGS,
        *setup["NVCC_FLAGS"],
        "-Xcompiler=-fPIC",
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={setup['TORCH_TARGET_VERSION']}",
        *(f"-isystem={path}" for path in cpp_extension.include_paths("cpu")),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES),
    ]


@dataclass(frozen=True)
class Job:
    """One file, for every architecture."""

    source: Path
    nvcc: str
    state: str  # of all else that its object file depends on
    target: str = "nvcc"

    def __str__(self) -> str:
        return self.source.name

    def run(self, build: Path) -> tuple[Sequence[Resources], bool]:
        """Compile; return what its kernels take and whether the folder `build` knew it already."""
        name = f"{self.source.stem}-{_digest(self.state, self.source.read_text())}"
        return kept(build / f"{name}.json", lambda: self._compile(build / f"{name}.o"))

    def _compile(self, target: Path) -> list[Resources]:
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [self.nvcc, *flags(), "-c", str(self.source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr + result.stdout)
        found = of_nvidia(target)
        names = subprocess.check_output(["c++filt", "-p", *(entry.kernel for entry in found)])
        pairs = zip(found, names.decode().splitlines(), strict=True)
        return [replace(entry, kernel=name.removeprefix("void ")) for entry, name in pairs]


def jobs(nvcc: str, folder: Path = ROOT / "csrc") -> list[Job]:
    """One for each .cu file under a folder; a change in any header concerns all of them."""
    version = subprocess.check_output([nvcc, "--version"], text=True)
    headers = [p.read_text() for p in sorted(folder.rglob("*")) if p.suffix in (".h", ".cuh")]
    state = _digest(version, torch.__version__, *flags(), *headers)
    return [Job(source, nvcc, state) for source in sorted(folder.rglob("*.cu"))]


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
