"""`python -m mtkd.demo [text]`: distil many teachers into one small student, compare losses."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import save_file
from threadpoolctl import threadpool_limits  # type: ignore  # comes with scikit-learn, untyped
from tqdm import tqdm

from .experiment import Outcome, Settings, run_seed, steps
from .report import collect, draw, table, verdict, write_json


def main(arguments: list[str] | None = None) -> None:
    """Run the demonstration and write its results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["text"]:
        from .text.__main__ import main as main_text  # needs transformers, which digits do not

        return main_text(arguments[1:])
    options = _parse(arguments)
    settings = replace(Settings(), seeds=options.seeds, epochs=options.epochs)
    if options.quick:
        settings = replace(settings, seeds=1, epochs=3, teacher_epochs=4, held_out=0.8)
    start = time.perf_counter()
    with threadpool_limits(1):  # everything is tiny: a second thread costs more than it saves
        outcomes = _run(settings)
    seconds = time.perf_counter() - start
    options.out.mkdir(parents=True, exist_ok=True)
    scores, dims = collect(outcomes), outcomes[0].dims
    write_json(options.out / "results.json", settings, outcomes, seconds)
    draw(options.out / "figure.png", scores, dims)
    _save_student(options.out / "student.safetensors", settings, outcomes[0])
    print(f"\n{table(scores, dims, settings.width)}\n\n{verdict(scores)}\n")
    print(
        f"{seconds:.0f} s; results.json, figure.png and student.safetensors are in {options.out}/"
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mtkd.demo",
        description=__doc__,
        epilog="python -m mtkd.demo text: six teachers of text, and a small transformer",
    )
    defaults = Settings()
    parser.add_argument("--seeds", type=int, default=defaults.seeds, help="default %(default)s")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="one seed, a few epochs: does it run?")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.epochs) < 1:
        parser.error("--seeds and --epochs: expected at least 1")
    return options


def _run(settings: Settings) -> list[Outcome]:
    with tqdm(total=steps(settings), bar_format="{l_bar}{bar:24}{r_bar}") as bar:

        def progress(job: str) -> None:
            bar.set_description(f"seed {seed + 1}/{settings.seeds}: {job:20}", refresh=False)
            bar.update()

        outcomes = []
        for seed in range(settings.seeds):
            outcomes.append(run_seed(seed, settings, progress))
    return outcomes


def _save_student(path: Path, settings: Settings, outcome: Outcome) -> None:
    """Weights of the first seed's Gaussian student; its heads have done their work."""
    assert outcome.student is not None
    metadata = {
        "format": "pt",
        "architecture": f"mtkd.demo.students.student(width={settings.width})",
        "input": "(N, 64) images of 8 x 8 pixels in [0, 1]",
        "loss": "gaussian",
        "seed": "0",
        "settings": json.dumps(asdict(settings)),
        "teachers": json.dumps(outcome.dims),
    }
    save_file(outcome.student.state_dict(), path, metadata)


if __name__ == "__main__":
    main()
