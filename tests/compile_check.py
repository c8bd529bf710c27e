"""Compiles every GPU kernel without a GPU and fails where one does not fit: `make compile-check`.

Triton kernels are compiled as dispatch launches them (compile_cases.py says from where), CUDA C++
files as setup.py builds them. Prints one line a kernel and target: registers and spilled bytes of
a thread, shared memory of a block, seconds. Fails on spilled registers, on shared memory beyond
the card's, on an error. What has not changed is read from build/compile-check.
"""

import argparse
import os
import runpy
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import compile_nvcc
import compile_triton
from compile_resources import Resources
from compile_triton import TARGETS

HERE = Path(__file__).parent
LINE = "{:>8} {:>9} {:>7} {:>7} {:>8}  {}"
Job = compile_triton.Job | compile_triton.NoJob | compile_nvcc.Job


@dataclass(frozen=True)
class Outcome:
    """Of one job: what its kernels take, or its error; no seconds if it was known before."""

    job: str
    target: str
    resources: Sequence[Resources] = ()
    seconds: float | None = None
    error: str | None = None

    def lines(self) -> Iterator[str]:
        time = "known" if self.seconds is None else f"{self.seconds:.1f}"
        for r in self.resources:
            yield LINE.format(
                r.target, r.registers, r.spills, r.shared, time, f"{r.kernel}  {self.job}"
            )

    def problems(self) -> Iterator[str]:
        if self.error is not None:
            yield f"{self.job}, {self.target}: {self.error}"
        for r in self.resources:
            if excess := r.excess():
                yield f"{r.kernel}, {self.job}, {r.target}: {excess}"


def attempt(job: Job, build: Path) -> Outcome:
    """Run a job; an error is an outcome."""
    start = time.perf_counter()
    try:
        resources, known = job.run(build)
    except Exception as error:
        return Outcome(str(job), job.target, error=f"{type(error).__name__}: {error}")
    seconds = None if known else time.perf_counter() - start
    return Outcome(str(job), job.target, resources, seconds)


def attempt_all(jobs: Sequence[Job], build: Path) -> Iterator[Outcome]:
    """Run the jobs on every core, in forked processes, which have the kernels already."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, get_context("fork"), _remember, (jobs, build)) as pool:
        yield from pool.map(_attempt_remembered, range(len(jobs)))


def _remember(jobs: Sequence[Job], build: Path) -> None:
    global _remembered
    _remembered = jobs, build


def _attempt_remembered(index: int) -> Outcome:
    jobs, build = _remembered
    return attempt(jobs[index], build)


def triton_jobs(cases: Path, selected: str) -> list[Job]:
    """The kernels that a file's `configurations()` launch, a configuration's targets together."""
    table = runpy.run_path(str(cases), run_name=cases.stem)["configurations"]()
    configurations = [(name, launch) for name, launch in table if selected in name]
    order = {name: place for place, (name, _) in enumerate(configurations)}
    jobs = [job for target in TARGETS for job in compile_triton.record(configurations, target)]
    return sorted(jobs, key=lambda job: order[job.configuration])


def check(jobs: Sequence[Job], build: Path) -> list[str]:
    """Run jobs and print the table; return the problems found."""
    print(LINE.format("target", "registers", "spilled", "shared", "seconds", "kernel"))
    problems: list[str] = []
    for outcome in attempt_all(jobs, build):
        for line in outcome.lines():
            print(line, flush=True)
        problems += outcome.problems()
    return problems


def main() -> int:
    """Compile what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-k", default="", metavar="TEXT", help="configurations with this in them")
    parser.add_argument("--cases", type=Path, default=HERE / "compile_cases.py", help="their table")
    parser.add_argument("--build", type=Path, default=HERE.parent / "build" / "compile-check")
    options = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = str(options.build / "triton")
    nvcc = compile_nvcc.find_nvcc()
    files = compile_nvcc.jobs(nvcc) if nvcc else []
    jobs = [
        *(job for job in files if options.k in str(job)),
        *triton_jobs(options.cases, options.k),
    ]
    if not jobs:
        parser.error(f"nothing is named {options.k!r}")
    problems = check(jobs, options.build)
    for problem in problems:
        print(f"FAILED {problem}")
    print(f"{len(jobs)} compilations, {len(problems)} problems")
    if nvcc is None:
        print("nvcc not found (CUDA_HOME, PATH, /usr/local/cuda): no .cu file was compiled")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
