"""Triton kernels for the compile check: launches are recorded without a GPU, then compiled.

Triton itself makes the types, hints and constants of a launch: only its driver, its compiler and
the kernel it would start are replaced, so a recorded launch is what a card would be given.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from compile_resources import Resources, kept, of_amd, of_nvidia
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_MEMORY = 512  # columns that a block may take of it
Configuration = tuple[str, Callable[[], Any]]  # its name, and what launches its kernels


class Recorder:
    """Stands in for Triton's driver, for its compiler, and for the kernels that this makes."""

    function = packed_metadata = None

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.device = object()  # a card that no kernel has been compiled for
        self.sources: list[tuple[Any, dict[str, Any]]] = []  # of kernels not launched before
        self.launches = 0

    def record(self, launch: Callable[[], Any]) -> list[tuple[Any, dict[str, Any]]]:
        """Return the sources and options that are launched now and were not before."""
        self.launches, self.sources = 0, []
        launch()
        if not self.launches:
            raise RuntimeError("no Triton kernel was launched")
        return self.sources

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> object:
        return self.device

    def get_current_stream(self, device: object) -> int:
        return 0

    def compile(self, source: Any, target: GPUTarget, options: dict[str, Any]) -> "Recorder":
        self.sources.append((source, options))
        return self

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        self.launches += 1


@dataclass(frozen=True)
class Job:
    """One kernel, as one configuration launches it, for one target."""

    configuration: str
    source: Any
    target: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return self.configuration

    def run(self, build: Path) -> tuple[Sequence[Resources], bool]:
        """Compile; return what it takes and whether the folder `build` knew it already."""
        kernel = triton.compile(self.source, target=TARGETS[self.target], options=self.options)
        return kept(build / f"{kernel.hash}.json", lambda: [_resources(kernel, self.target)])


@dataclass(frozen=True)
class NoJob:
    """What is wrong with a configuration that launches no kernel, told when its turn comes."""

    configuration: str
    target: str
    error: Exception

    def __str__(self) -> str:
        return self.configuration

    def run(self, build: Path) -> tuple[Sequence[Resources], bool]:
        raise self.error


def record(configurations: Iterable[Configuration], target: str) -> list[Job | NoJob]:
    """Run what launches kernels, without a GPU; return the kernels to compile for a target."""
    jobs: list[Job | NoJob] = []
    recorder = Recorder(TARGETS[target])
    triton.runtime.driver.set_active(recorder)
    try:
        with mock.patch("triton.compiler.compile", recorder.compile):
            for name, launch in configurations:
                try:
                    new = recorder.record(launch)
                except Exception as error:
                    jobs.append(NoJob(name, target, error))
                else:
                    jobs += [Job(name, source, target, options) for source, options in new]
    finally:
        triton.runtime.driver.set_active(None)
    return jobs


def _resources(kernel: Any, target: str) -> Resources:
    if target.startswith("gfx"):
        found = of_amd(kernel.asm["amdgcn"], target)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.kernel)
            file.flush()
            (found,) = of_nvidia(Path(file.name), target)
    tensor_memory = getattr(kernel.metadata, "tmem_size", None) or 0
    if tensor_memory > TENSOR_MEMORY:
        raise RuntimeError(f"{tensor_memory} columns of tensor memory, {TENSOR_MEMORY} are there")
    module = kernel.src.fn.__module__.removeprefix("mtkd.triton.")
    return replace(found, kernel=f"{module}.{kernel.name}", shared=kernel.metadata.shared)
