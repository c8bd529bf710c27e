"""Run the benchmarks: ``python -m benchmarks``, on a GPU with ``--device cuda``."""

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import docs, machine, measure, plots, report, results
from .cases import CASES, CHECKED, DRY, LOSSES, REGIMES, Case

# what a dry run has no GPU or no time for
LEFT_OUT = {
    "graph": "would run: the loop, captured in CUDA graphs",
    "compile": "would run: the packed formula under torch.compile",
}
ENDED = (0, 1)  # exit codes of a process that came to its end: all well, or something wrong
DIED = 3


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("loss", nargs="?", choices=[*LOSSES, "import"], help="default: all")
    parser.add_argument("--device", choices=list(CASES), default="cpu")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="few repeats, small cases")
    parser.add_argument("--again", action="store_true", help="also what today's file has already")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, help="default: another one each time, 0 in a dry run")
    parser.add_argument("--out", type=Path, help="folder of results or plots")
    parser.add_argument("--check", action="store_true", help="compare results only, small sizes")
    parser.add_argument("--dry-run", action="store_true", help="GPU cases on a CPU, tiny")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--plots", type=Path, metavar="FILE", help="draw a result file and stop")
    parser.add_argument("--docs", action="store_true", help="write page and plots and stop")
    regimes = [regime for group in REGIMES.values() for regime in group]
    parser.add_argument("--regime", choices=regimes, help="default: all, in processes of their own")
    parser.add_argument("--untried", action="store_true", help="only what has no result at all")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = 0 if options.dry_run else random.randrange(1 << 30)
    return options


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    device = "cuda" if options.dry_run else options.device
    cases = [c for c in CASES[device] if options.loss in (None, c.loss) and options.only in c.name]
    return [c for c in cases if not options.quick or c.numbers <= 1 << 20]


def missing(options: argparse.Namespace, into: results.Store) -> list[Case]:
    """The chosen cases without a good result; those tried before come last."""
    cases, regime = chosen(options), options.regime
    if not options.again:
        cases = [case for case in cases if not into.done(regime, case.name)]
    if options.untried:
        cases = [case for case in cases if not into.tried(regime, case.name)]
    return sorted(cases, key=lambda case: into.tried(regime, case.name))


def store(options: argparse.Namespace) -> results.Store:
    """Where results go."""
    here, folder = machine.describe(options.device, options.threads), options.out or results.FOLDER
    if options.dry_run:
        return results.Store(folder / "dry-run.json", here, dry_run=True)
    return results.Store(results.path_of(folder, machine.slug(here)), here)


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    """The dtype of inputs; Triton's interpreter cuts bfloat16 off where hardware rounds."""
    if options.dry_run:
        return torch.float16
    return torch.bfloat16 if options.device == "cuda" else torch.float32


def regime(options: argparse.Namespace) -> int:
    """Run every case in this process, in its regime; return how many failed."""
    into = store(options)
    clock = measure.GpuClock() if options.device == "cuda" else measure.CpuClock()
    found = machine.ceilings(clock, small=options.dry_run)
    shown = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    print(f"\n{options.regime}: {shown}; seed {options.seed}", flush=True)
    doubts = [] if options.dry_run else machine.doubts(options.device, found)
    print("".join(f"  {doubt}\n" for doubt in doubts), end="")
    into.add("ceilings", options.regime, found)
    print(report.header())
    failed = 0
    for case in missing(options, into):
        into.begin(options.regime, case.name)
        result = measured(case, options, clock, found)
        into.add(options.regime, case.name, result)
        print("\n".join(_lines(case, options, result)), flush=True)
        failed += "failed" in result
        if not clock.alive():
            sys.exit(DIED)
    return failed


def measured(
    case: Case, options: argparse.Namespace, clock: measure.Clock, ceilings: dict[str, float]
) -> dict[str, Any]:
    """Run a case; it has "failed" where its numbers are wrong or it did not run."""
    from .run import Bench, run  # pages and plots need no library

    budget = 0.5 if options.quick else 1.0 if options.device == "cuda" else 3.0
    torch._dynamo.reset()
    try:
        if options.dry_run:
            bench = Bench(case.shrunk(*DRY), clock, dtype_of(options), options.seed)
            return run(bench, ceilings, 0.0, LEFT_OUT) | {"size": case.size()}
        bench = Bench(case, clock, dtype_of(options), options.seed)
        return run(bench, ceilings, budget, {})
    except Exception as error:  # the other cases still run
        return {"failed": f"{type(error).__name__}: {error}"}


def _lines(case: Case, options: argparse.Namespace, result: dict[str, Any]) -> Iterator[str]:
    if "failed" in result:
        yield f"{case.name}: FAILED, no speed: {result['failed']}"
        return
    yield report.line(case, result)
    yield from report.details(result)
    if not options.dry_run:
        yield from report.standing(case, options.regime, result)


def compared(options: argparse.Namespace) -> int:
    """Compare every kind of case with float64 at small sizes; return how many are wrong."""
    from . import check
    from .problem import Draw

    wrong = 0
    small = (case.shrunk(*CHECKED) for case in chosen(options))
    for case in {case.name: case for case in small}.values():
        dtype = getattr(torch, case.dtype, dtype_of(options))
        draw = Draw(options.device, dtype, options.seed)
        result = check.checked(case, draw, case.rows)
        verdict = check.verdict(result)
        print(f"{case.name}: {verdict or report.errors(result)}", flush=True)
        wrong += bool(verdict)
    return wrong


def imports(options: argparse.Namespace) -> None:
    """Time what the library adds to `import torch`."""
    taken = machine.import_seconds(3 if options.quick else 9)
    store(options).add("imports", "seconds", taken)
    torch_, ours = taken["torch"], taken["mtkd.functional"]
    print(f"import torch {torch_:.2f} s, mtkd.functional adds {ours:.3f} s")


def children(options: argparse.Namespace) -> int:
    """Run each regime in a process of its own; return how many found something wrong.

    After a process that died, another one goes on with what has not been tried.
    """
    failed = 0
    for name in REGIMES["cuda" if options.dry_run else options.device]:
        environment = os.environ | (machine.WARM if name == "warm" else {})
        command = [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--regime", name]
        codes = [subprocess.run(command, env=environment).returncode]
        while codes[-1] not in ENDED and len(codes) <= len(chosen(options)):
            print(f"{name}: the process died (exit code {codes[-1]}), the rest in another one")
            codes.append(subprocess.run([*command, "--untried"], env=environment).returncode)
        failed += any(codes)
    return failed


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available() and not options.dry_run:
        print(f"--device cuda: PyTorch {torch.__version__} sees no GPU here", file=sys.stderr)
        return 2
    if options.only and not chosen(options):
        print(f"--only: expected part of a name in --list, got {options.only!r}", file=sys.stderr)
        return 2
    if options.docs:
        docs.write()
    elif options.plots:
        print(*plots.draw(options.plots, options.out or plots.FIGURES), sep="\n")
    elif options.list:
        print(*(case.name for case in chosen(options)), sep="\n")
    elif options.check:
        return min(1, compared(options))
    elif options.regime:
        return min(1, regime(options))
    else:
        if options.loss in (None, "import") and not options.dry_run:
            imports(options)
        return 0 if options.loss == "import" else min(1, children(options))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # each result so far is in its file
        sys.exit(130)
