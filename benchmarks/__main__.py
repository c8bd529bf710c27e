"""Run the benchmarks of one loss: ``python -m benchmarks gaussian_nll``."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import measure, report
from .cases import CASES, Case
from .gaussian import PROBLEMS, gradient_error

TOLERANCE = 1e-5  # of value and gradients in float32, against float64


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("loss", nargs="?", choices=[*PROBLEMS, "import"], help="default: all")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="few repeats, small cases")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--markdown", type=Path, help="print a result file as tables and stop")
    parser.add_argument(
        "--regime", choices=["cold", "warm"], help="default: both, in two processes"
    )
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    cases = [c for c in CASES if options.loss in (None, c.loss) and options.only in c.name]
    return [c for c in cases if not options.quick or c.rows * sum(c.dims) <= 1 << 20]


def run(case: Case, quick: bool, probes: dict[str, float]) -> dict[str, Any]:
    """Check a case, then time it; a case whose numbers are wrong gets no speed."""
    error = gradient_error(case)
    if not error < TOLERANCE:
        raise SystemExit(f"{case.name}: error {error:.1e} against float64: not timed")
    problem = PROBLEMS[case.loss](case)
    steps = problem.steps()
    times, first = measure.interleaved(steps, problem.clear, 0.5 if quick else 3.0)
    peak = measure.peak_bytes(steps["ours"], problem.clear)
    floor = problem.floor_bytes() / (probes["copy_gbs"] * 1e9)
    floor = max(floor, times.get("gemms", 0.0))
    return {
        "milliseconds": {name: 1e3 * value for name, value in times.items()},
        "first_call_milliseconds": {name: 1e3 * value for name, value in first.items()},
        "extra_mib": None if peak is None else max(0, peak - problem.gradient_bytes()) / 2**20,
        "share_of_floor": floor / times["ours"],
        "gradient_error": error,
        "skipped": problem.skipped(),
    }


def child(options: argparse.Namespace) -> None:
    """Run every case in this process, in its regime."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine, probes = measure.machine(options.threads), measure.probe()
    path = report.path_of(options.out, machine)
    shown = ", ".join(f"{name} {value:.1f}" for name, value in probes.items())
    print(f"\n{options.regime}: {shown}", *measure.doubts(probes), sep="\n  ", flush=True)
    report.add(path, machine, "probes", options.regime, probes)
    print(report.header())
    for case in chosen(options):
        result = run(case, options.quick, probes)
        report.add(path, machine, options.regime, case.name, result)
        rows = [report.line(case, result), *report.asked(case, options.regime, result)]
        print("\n".join(rows), flush=True)
        torch._dynamo.reset()


def imports(options: argparse.Namespace) -> None:
    """Time what the library adds to `import torch`."""
    machine = measure.machine(options.threads)
    taken = measure.import_seconds(3 if options.quick else 9)
    report.add(report.path_of(options.out, machine), machine, "imports", "seconds", taken)
    torch_, ours = taken["torch"], taken["mtkd.functional"]
    print(f"import torch {torch_:.2f} s, mtkd.functional adds {ours:.3f} s")


def main() -> None:
    """Run what the command line asks for; each regime in a process of its own."""
    options = arguments()
    if options.markdown:
        print(report.markdown(options.markdown))
        return
    if options.list:
        print(*(case.name for case in chosen(options)), sep="\n")
        return
    if options.regime:
        child(options)
        return
    if options.loss in (None, "import"):
        imports(options)
    for regime in ("cold", "warm") if options.loss != "import" else ():
        environment = os.environ | (measure.WARM if regime == "warm" else {})
        command = [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--regime", regime]
        subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
