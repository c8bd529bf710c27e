"""Builds the optional extension ``mtkd._C``; everything else about the package is in pyproject.toml.

``MTKD_NO_EXTENSION=1`` leaves it out; ``TORCH_CUDA_ARCH_LIST`` chooses GPU architectures.
"""

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
# The oldest torch whose stable C++ interface the kernels need; one binary serves that and newer.
TORCH_TARGET_VERSION = "0x020a000000000000"
# Never -ffast-math: it makes the whole process flush subnormal numbers to zero.
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",  # selects are vectorised; no effect on results
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"]


def obstacle():
    """Why the extension is not built here; None where a build that fails is an error."""
    if os.environ.get("MTKD_NO_EXTENSION", "0") not in ("", "0"):
        return "MTKD_NO_EXTENSION is set"
    if sys.platform == "win32":
        return "it needs Linux or macOS"
    if "CXX" not in os.environ and shutil.which("c++") is None:
        return "there is no C++ compiler (c++) on the PATH"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers (Python.h) are not installed"
    return None


def sources(pattern):
    """Source files as setuptools wants them: relative to setup.py, in a fixed order."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def extension():
    """The extension module: C++ kernels, and CUDA ones where nvcc and a CUDA torch are present."""
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"mtkd's extension needs {error.name} to build: pip install torch pybind11 ninja,"
            " or set MTKD_NO_EXTENSION=1"
        ) from error

    cpp, cuda = sources("csrc/cpu/*.cpp"), sources("csrc/cuda/*.cu")
    with_cuda = bool(cuda and torch.version.cuda and cpp_extension.CUDA_HOME)
    kernels = cpp + cuda * with_cuda
    # Other people's headers count as the system's: no warnings from there.
    headers = [pybind11.get_include(), *cpp_extension.include_paths()]
    system = [flag for path in headers for flag in ("-isystem", path)]
    macros = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        ("MTKD_KERNELS", ",".join(re.sub(r"csrc/|\.cu$|\.cpp$", "", path) for path in kernels)),
    ]
    build = cpp_extension.CppExtension
    if with_cuda:
        flags = " ".join(cpp_extension._get_cuda_arch_flags())  # what BuildExtension will pass
        architectures = ",".join(re.findall(r"code=(\w+)", flags))
        macros += [("USE_CUDA", None), ("MTKD_CUDA_ARCHITECTURES", architectures)]
        build = cpp_extension.CUDAExtension
    else:
        macros.append(("MTKD_CUDA_ARCHITECTURES", ""))
    return build(
        "mtkd._C",
        ["csrc/module.cpp", *kernels],
        define_macros=macros,
        depends=sources("csrc/**/*.h") + sources("csrc/**/*.cuh"),
        extra_compile_args={"cxx": CXX_FLAGS + system, "nvcc": NVCC_FLAGS + system},
    )


def build_options():
    """Arguments for setup(): the extension and its builder, or one printed line why neither."""
    reason = obstacle()
    if reason:
        print(f"mtkd: no compiled kernels, because {reason}; PyTorch formulas are used instead.")
        return {}
    module = extension()
    from torch.utils.cpp_extension import BuildExtension

    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**build_options())
