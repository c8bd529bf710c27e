"""The machine: its hardware by name, and its ceilings in this run."""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .measure import Clock

# glibc that keeps and reuses freed memory, so that no call pays for fresh pages
WARM = {
    "MALLOC_MMAP_THRESHOLD_": str(16 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def describe(device: str, threads: int) -> dict[str, Any]:
    """The machine, by its hardware, and the versions that matter."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    ids = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in text.splitlines())}
    facts = {
        "kind": device,
        "cpu": ids.get("model name", platform.processor()),
        "cpu_family_model": f"{ids.get('cpu family', '')}-{ids.get('model', '')}".strip("-"),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "torch": torch.__version__,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
    return facts if device == "cpu" else facts | _gpu()


def _gpu() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "gpu_memory_gib": round(gpu.total_memory / 2**30),
        "l2_mib": round(gpu.L2_cache_size / 2**20),
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        "triton": triton,
    }


def slug(machine: dict[str, Any]) -> str:
    """The machine in a file's name."""
    words = machine.get("gpu", "")
    if not words:
        words = f"{machine['cpu']} {machine['cpu_family_model']} {machine['threads']}t"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def sentence(machine: dict[str, Any]) -> str:
    """The machine in a line of text."""
    if "gpu" in machine:
        return (
            f"{machine['gpu']} ({machine['multiprocessors']} multiprocessors,"
            f" {machine['gpu_memory_gib']} GiB, {machine['l2_mib']} MiB of L2, capability"
            f" {machine['capability']}), torch {machine['torch']}, CUDA {machine['cuda']},"
            f" triton {machine['triton']}"
        )
    return (
        f"{machine['cpu']} ({machine['cores']} cores, SIMD {machine['simd']}),"
        f" {machine['threads']} threads, torch {machine['torch']}"
    )


def ceilings(clock: Clock, small: bool = False) -> dict[str, float]:
    """What the machine reaches now: copy and matrix product; on a CPU a threaded exponential."""
    on_gpu = clock.device == "cuda"
    size, numbers = (8192, 1 << 29) if on_gpu else (2048, 16 << 20)
    if small:
        size, numbers = 64, 1 << 16
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a, b, x = (
        torch.randn(n, dtype=dtype, device=clock.device) for n in ((size,) * 2,) * 2 + ((numbers,),)
    )
    c, y = torch.empty_like(a), torch.empty_like(x)
    traffic = 2 * x.numel() * x.element_size()

    def rate(work: float, step: Any) -> float:
        step()
        return work / median(clock.block([step]) for _ in range(9)) / 1e9

    found = {
        "gemm_gflops": rate(2 * size**3, lambda: torch.mm(a, b, out=c)),
        "copy_gbs": rate(traffic, lambda: y.copy_(x)),
    }
    if not on_gpu:
        found["exp_gbs"] = rate(traffic, lambda: torch.exp(x, out=y))
    return found | {"load": os.getloadavg()[0]}


def doubts(device: str, found: dict[str, float]) -> list[str]:
    """What is off with the machine, in sentences."""
    words = []
    if device == "cpu" and found["gemm_gflops"] < 150:
        words.append(
            f"matrix products at {found['gemm_gflops']:.0f} GFLOP/s: threads share a core?"
        )
    if device == "cpu" and found["copy_gbs"] < 30:
        words.append(f"copies at {found['copy_gbs']:.0f} GB/s: memory is busy")
    return words


def import_seconds(repeats: int) -> dict[str, float]:
    """Seconds that `import torch` takes, and what `import mtkd.functional` adds."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter();"
        "import mtkd.functional; print(b - a, time.perf_counter() - b)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(repeats)
    ]
    pairs = [tuple(map(float, run.stdout.split())) for run in runs]
    return {"torch": median(a for a, _ in pairs), "mtkd.functional": median(b for _, b in pairs)}
