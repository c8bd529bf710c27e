"""The compile check can fail: on spills, on shared memory, on errors; it caches what it knows.

This file is also the check's table for these tests: `configurations` launches kernels that do not
fit a card, and one product of matrices that does.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import compile_nvcc  # noqa: E402
import triton.language as tl  # noqa: E402
from compile_check import attempt  # noqa: E402
from compile_resources import Resources, of_amd, parse_cuobjdump  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

HERE = Path(__file__)
NVCC = compile_nvcc.find_nvcc()
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@triton.jit
def greedy(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    first, second = tl.load(x + at), tl.load(y + at)
    tl.store(x + at, first * tl.sum(second, 0) + second * tl.max(first, 0))


@triton.jit
def product(x, y, z, width, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    row, column = tl.program_id(0) * SIZE, tl.program_id(1) * SIZE
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, width, DEPTH):
        total = tl.dot(x.load([row, start]), y.load([column, start]).T, total)
    z.store([row, column], total.to(z.dtype))


@triton.jit
def mistaken(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.zeros([SIZE // 2], tl.float32))


def target():
    return triton.runtime.driver.active.get_current_target()


def launch_greedy(size):
    x = torch.empty(size)
    limit = {"maxnreg": 32} if target().backend == "cuda" else {}
    greedy[(1,)](x, x, SIZE=size, num_warps=1, **limit)


def launch_product(size, stages):
    """With tiles of a host's descriptors, and a depth that depends on the card."""
    depth = 32 if target().backend == "hip" else 64
    x = torch.empty(512, 512, dtype=torch.bfloat16, device="meta")
    operand = TensorDescriptor.from_tensor(x, [size, depth])
    result = TensorDescriptor.from_tensor(x.float(), [size, size])
    product[(1, 1)](operand, operand, result, 512, SIZE=size, DEPTH=depth, num_stages=stages)


def configurations():
    yield "a product", partial(launch_product, 32, 3)
    yield "too many registers", partial(launch_greedy, 2048)
    yield "too much shared memory", partial(launch_product, 32, 40)
    yield "without code", lambda: mistaken[(1,)](torch.empty(64), SIZE=64)
    yield "without a launch", lambda: None
    yield "without a kernel", lambda: mistaken[(1,)](torch.empty(64), 64, 64, 64)


def check(build, selected, **environment):
    """Run the check on this file's table, without an interpreter that the tests may run under."""
    script = HERE.with_name("compile_check.py")
    command = [sys.executable, script, "--cases", HERE, "--build", build, "-k", selected]
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def lines(output, word):
    return [line for line in output.splitlines() if word in line]


def test_a_kernel_that_fits_passes_and_is_known_the_next_time(tmp_path):
    status, output = check(tmp_path, "a product")
    assert status == 0, output
    rows = [line.split() for line in lines(output, "test_compile_check.product")]
    assert [row[0] for row in rows] == TARGETS
    assert all(int(row[1]) > 0 and int(row[3]) > 0 and "known" not in row for row in rows)
    status, output = check(tmp_path, "a product", CUDA_HOME=str(tmp_path))
    assert (status, len(lines(output, " known "))) == (0, 4)
    assert output.splitlines()[-2] == "4 compilations, 0 problems"
    assert output.splitlines()[-1].startswith("nvcc not found")


def test_what_does_not_fit_fails_each_time(tmp_path):
    status, output = check(tmp_path, "too m")
    assert status == 1
    greedy = lines(output, "FAILED test_compile_check.greedy, too many registers, sm_")
    assert len(greedy) == 3, output
    assert all(line.endswith("registers spilled to memory") for line in greedy)
    product = lines(output, "FAILED test_compile_check.product, too much shared memory, sm_")
    assert len(product) == 2, output
    assert all("bytes of shared memory, where 232448 is the most" in line for line in product)
    status, again = check(tmp_path, "too m")
    assert (status, lines(again, "FAILED")) == (1, lines(output, "FAILED"))


def test_what_does_not_compile_or_launches_nothing_fails(tmp_path):
    status, output = check(tmp_path, "without")
    assert status == 1
    problems = dict(line.split(": ", 1) for line in lines(output, "FAILED"))
    names = ("code", "a launch", "a kernel")
    assert list(problems) == [f"FAILED without {n}, {t}" for n in names for t in TARGETS]
    assert "CompilationError" in problems["FAILED without code, gfx942"]
    assert "no Triton kernel was launched" in problems["FAILED without a launch, sm_80"]
    assert "TypeError" in problems["FAILED without a kernel, sm_100"]


def test_a_name_that_nothing_has_is_an_error(tmp_path):
    status, output = check(tmp_path, "misspelt")
    assert status == 2
    assert "nothing is named 'misspelt'" in output


CUOBJDUMP = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:255 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

AMDGCN = """
\t{instruction} v1, off, s0
    .group_segment_fixed_size: 4096
    .name:           first
    .private_segment_fixed_size: 24
    .sgpr_count:     30
    .vgpr_count:     100
"""


def test_resources_are_read_from_what_tools_print():
    first, second = parse_cuobjdump(CUOBJDUMP)
    assert first == Resources("first", "sm_90a", registers=40, spills=0, shared=1024)
    assert second == Resources("second", "sm_90a", registers=255, spills=24, shared=0)
    spilled = of_amd(AMDGCN.format(instruction="scratch_store_dword"), "gfx942")
    assert spilled == Resources("first", "gfx942", registers=100, spills=24, shared=4096)
    assert of_amd(AMDGCN.format(instruction="global_load_dword"), "gfx942").spills == 0


def test_limits_are_the_cards():
    within = Resources("first", "sm_80", registers=255, spills=0, shared=163 * 1024)
    assert within.excess() is None
    assert "spilled" in replace(within, spills=4).excess()
    assert "shared memory" in replace(within, shared=within.shared + 1).excess()
    assert "shared memory" in replace(within, target="gfx942").excess()


SPILLING = """
__global__ void spilling(float* x) {
  float held[99];
  for (int i = 0; i < 99; ++i) held[i] = x[i];
  x[threadIdx.x] = held[threadIdx.x];
}
"""


@pytest.mark.skipif(NVCC is None, reason="nvcc not found")
def test_cuda_files_are_compiled_for_every_architecture(tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text(SPILLING)
    (job,) = compile_nvcc.jobs(NVCC, tmp_path)
    outcome = attempt(job, tmp_path)
    assert [r.target for r in outcome.resources] == ["sm_80", "sm_90a", "sm_100"]
    problems = list(outcome.problems())
    assert len(problems) == 3
    assert all("spilling, kernel.cu" in line and "spilled" in line for line in problems)
    assert attempt(job, tmp_path).seconds is None
    source.write_text("__global__ void broken() { missing(); }")
    (problem,) = attempt(job, tmp_path).problems()
    assert "kernel.cu" in problem
    assert "missing" in problem
