"""Builds the optional extension ``mtkd._C``; pyproject.toml describes the rest of the package.

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
    f"-ffile-prefix-map={ROOT}=mtkd",  # messages name the file, not where it was built
    "-O3",
    "-g0",
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
    if with_cuda and not torch.cuda.is_available():  # else PyTorch takes the GPUs it sees
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    arch_flags = cpp_extension._get_cuda_arch_flags() if with_cuda else []  # as the build has them
    # What build_info() tells: lists of bare words, for C++ alone (nvcc splits -D at commas).
    registering = [path for path in kernels if "TORCH_LIBRARY" in (ROOT / path).read_text()]
    facts = {
        "KERNELS": [re.sub(r"^csrc/|\.\w+$", "", path) for path in registering],
        "CUDA_ARCHITECTURES": sorted(re.findall(r",code=(\w+)", " ".join(arch_flags))),
    }
    facts_flags = [f"-DMTKD_{name}={','.join(words)}" for name, words in facts.items()]
    # Other people's headers count as the system's: no warnings from there.
    headers = [pybind11.get_include(), *cpp_extension.include_paths("cuda" if with_cuda else "cpu")]
    system = [flag for path in headers for flag in ("-isystem", path)]
    build = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return build(
        "mtkd._C",
        ["csrc/module.cpp", *kernels],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            *([("USE_CUDA", None)] if with_cuda else []),
        ],
        depends=sources("csrc/**/*.h") + sources("csrc/**/*.cuh"),
        extra_compile_args={"cxx": CXX_FLAGS + system + facts_flags, "nvcc": NVCC_FLAGS + system},
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
