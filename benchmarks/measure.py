"""Timing, memory and the machine: medians of interleaved steps, ceilings of the same run."""

import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

Step = Callable[[], Any]
SLOW = 8.0  # seconds of a call that is not worth repeating

# glibc that keeps and reuses freed memory, so that no call pays for fresh pages
WARM = {
    "MALLOC_MMAP_THRESHOLD_": str(16 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def seconds(step: Step) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def interleaved(
    steps: dict[str, Step], clear: Step, budget: float, fewest: int = 5, most: int = 60
) -> tuple[dict[str, float], dict[str, float]]:
    """Median and first-call seconds of each step, taken in turn until the budget is spent.

    A step whose first call is hopelessly slow is not called again, and dropped from `steps`.
    """
    first = {}
    for name, step in list(steps.items()):
        clear()
        first[name] = seconds(step)
        if first[name] > SLOW:
            del steps[name]
        else:
            clear()
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for turn in range(most):
        if turn >= fewest and time.perf_counter() - start > budget:
            break
        for name, step in steps.items():
            clear()
            times[name].append(seconds(step))
    return {name: median(taken) for name, taken in times.items()}, first


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def peak_bytes(step: Step, clear: Step) -> int | None:
    """Most resident memory that one call adds, or None where the system does not tell.

    Resident memory counts what the matrix products' library takes too; Linux lets a process
    reset its own high-water mark.
    """
    try:
        clear()
        ctypes.CDLL(None).malloc_trim(0)  # free memory that is still resident would hide a peak
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def probe() -> dict[str, float]:
    """Ceilings of the machine now: matrix product, copy, and a threaded exponential."""
    a, b = torch.randn(2048, 2048), torch.empty(2048, 2048)
    x = torch.randn(16 << 20)
    y = torch.empty_like(x)
    gemm = median(seconds(lambda: torch.mm(a, a, out=b)) for _ in range(7))
    copy = median(seconds(lambda: y.copy_(x)) for _ in range(9))
    exp = median(seconds(lambda: torch.exp(x, out=y)) for _ in range(9))
    traffic = 2 * x.numel() * x.element_size()
    return {
        "gemm_gflops": 2 * 2048**3 / gemm / 1e9,
        "copy_gbs": traffic / copy / 1e9,
        "exp_gbs": traffic / exp / 1e9,
        "load": os.getloadavg()[0],
    }


def doubts(probes: dict[str, float]) -> list[str]:
    """What is off with the machine, in sentences."""
    found = []
    if probes["gemm_gflops"] < 150:
        found.append(
            f"matrix products at {probes['gemm_gflops']:.0f} GFLOP/s: threads share a core?"
        )
    if probes["copy_gbs"] < 30:
        found.append(f"copies at {probes['copy_gbs']:.0f} GB/s: memory is busy")
    return found


def machine(threads: int) -> dict[str, Any]:
    """The machine, by its hardware."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    ids = {k: v.strip() for k, _, v in (x.partition(":") for x in text.splitlines())}
    return {
        "cpu": models[0] if models else platform.processor(),
        "cpu_family_model": f"{ids.get('cpu family	', '')}-{ids.get('model		', '')}".strip(
            "-"
        ),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "torch": torch.__version__,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }


def import_seconds(repeats: int = 7) -> dict[str, float]:
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
