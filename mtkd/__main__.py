"""``python -m mtkd``: versions, devices, and which implementation each loss uses on each device."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, ops
from . import functional as functional  # registers the driver of the linear_* losses

_ROW_PREFIX = "linear_"  # losses of the driver, which calls the row loss of the name after it


def implementation(loss: str, device: str) -> str:
    """Name what a call of a loss runs on a device of a type, as registered with PyTorch.

    Args:
        loss: a loss's name, as in `mtkd.functional`.
        device: "cpu" or "cuda".

    Returns:
        "compiled", "triton", "formula", or "driver over" one of these.

    Example:
        >>> implementation("linear_gaussian_nll", "meta")
        'formula'
    """
    if loss.startswith(_ROW_PREFIX):
        row = implementation(loss.removeprefix(_ROW_PREFIX), device)
        return f"driver over {row}" if device in ("cpu", "cuda") else "formula"
    return ops.served.get((loss, device), "formula")


def versions() -> list[tuple[str, str]]:
    """Return names and versions of what mtkd stands on."""
    return [
        ("mtkd", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("CUDA", torch.version.cuda or "none (this PyTorch is a CPU build)"),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def devices() -> dict[str, list[str]]:
    """Return the devices here by type, each described."""
    torch_level = torch.backends.cpu.get_cpu_capability()
    simd = ops.extension.build_info()["simd"] if ops.extension else f"{torch_level} in PyTorch"
    found = {"cpu": [f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, SIMD {simd}"]}
    if torch.cuda.is_available():
        found["cuda"] = [_gpu(index) for index in range(torch.cuda.device_count())]
    return found


def _gpu(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"


def extension() -> str:
    """Say whether the compiled kernels are loaded and, if not, how to get them."""
    if ops.extension is not None:
        info = ops.extension.build_info()
        kernels = ", ".join(info["kernels"])
        return f"The compiled extension is loaded: {kernels}, by {info['compiler']}."
    return (
        "The compiled extension is not loaded: losses run on formulas, and on Triton on a GPU."
        " To have it, install a C++ compiler, leave MTKD_NO_EXTENSION unset, and run"
        " `pip install --no-build-isolation -e .` in the checkout."
    )


def table(rows: list[list[str]]) -> str:
    """Align cells into columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pairs = [zip(row, widths, strict=True) for row in rows]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in pairs)


def report() -> str:
    """Return all of it as text."""
    found = devices()
    described = [[kind.upper(), text] for kind, texts in found.items() for text in texts]
    losses = [["loss", *(kind.upper() for kind in found)]]
    for name in ops.NAMES:
        losses.append([name, *(implementation(name, kind) for kind in found)])
    facts = table([list(pair) for pair in versions()])
    return "\n\n".join((facts, table(described), extension(), table(losses)))


if __name__ == "__main__":
    print(report())
