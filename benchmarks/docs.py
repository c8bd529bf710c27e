"""docs/performance.md: the template beside this file, filled from the committed results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import machine, plots, report, results
from .cases import CASES, ERROR_LIMIT, IMPORT_LIMIT, REGIMES, Case

TEMPLATE = Path(__file__).parent / "performance.md"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
NOT_RUN = "not yet run on a GPU"
Results = list[tuple[str, dict[str, Any]]]


def write() -> None:
    """Draw the figures and write the page."""
    for name, _ in results.committed():
        plots.draw(results.FOLDER / name)
    PAGE.write_text(text(results.committed()))


def text(files: Results) -> str:
    """The page made of result files."""
    page = TEMPLATE.read_text()
    page = page.replace("<!-- asked -->", "\n\n".join(_asked(files)))
    return page.replace("<!-- results -->", "\n\n".join(_sections(files)))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _asked(files: Results) -> Iterator[str]:
    """Yield a table of what is asked and reached for every machine, and for a GPU not yet had."""
    for kind in ("cuda", "cpu"):
        here = [(name, data) for name, data in files if data["machine"]["kind"] == kind]
        if kind == "cuda":
            yield _served(bool(here))
        if kind == "cuda" and not here:
            yield f"### On a GPU: {NOT_RUN}"
            yield _asked_table(kind, None)
        for _, data in here:
            yield f"### On {machine.sentence(data['machine'])}"
            yield _asked_table(kind, data)


def _served(measured: bool) -> str:
    """Which implementation serves each loss on a GPU."""
    from mtkd.ops import ON_GPU

    losses = ", ".join(f"`{loss}` by {kernels}" for loss, kernels in ON_GPU.items())
    why = "the measured faster" if measured else "until both implementations have been measured"
    return f"On a GPU row losses are served so, {why}: {losses.replace('triton', 'Triton')}."


def _asked_table(kind: str, data: dict[str, Any] | None) -> str:
    rows = []
    for case in CASES[kind]:
        for regime in REGIMES[kind]:
            for name, limit in case.wanted(regime):
                what = [f"{case.name}", regime, report.wording(name), _limit(name, limit)]
                rows.append([*what, _reached(data, case, regime, name, limit)])
    if kind == "cuda":
        rows.append(_error_row(data))
    elif data is not None and "imports" in data:
        rows.append(_import_row(data))
    return _table(["case", "regime", "quantity", "asked", "reached"], rows)


def _limit(name: str, limit: float) -> str:
    return ("at most " if name in report.AT_MOST else "at least ") + report.shown(name, limit)


def _marked(text: str, good: bool) -> str:
    return text if good else f"**{text}**"


def _reached(data: dict[str, Any] | None, case: Case, regime: str, name: str, limit: float) -> str:
    if data is None:
        return NOT_RUN
    result = data.get(regime, {}).get(case.name, {})
    if "failed" in result:
        return "**check failed**"
    got = report.quantity(name, result)
    if got is None:
        return "not measured"
    return _marked(report.shown(name, got), report.meets(name, got, limit))


def _error_row(data: dict[str, Any] | None) -> list[str]:
    limit = ERROR_LIMIT[16]
    what = "gradient error over that of rounding exact gradients"
    row = ["every case", "gpu", what, f"at most {limit:.3g} x"]
    if data is None:
        return [*row, NOT_RUN]
    shares = [r["of_allowed"] for r in data.get("gpu", {}).values() if "of_allowed" in r]
    if not shares:
        return [*row, "not measured"]
    return [*row, _marked(f"at worst {limit * max(shares):.3g} x", max(shares) <= 1)]


def _import_row(data: dict[str, Any]) -> list[str]:
    taken = data["imports"]["seconds"]
    added, torch_ = taken["mtkd.functional"], taken["torch"]
    what = f"time over `import torch` ({torch_:.2f} s)"
    reached = _marked(f"{added:.3f} s", added <= IMPORT_LIMIT)
    return ["import mtkd.functional", "", what, f"at most {IMPORT_LIMIT} s", reached]


def _sections(files: Results) -> Iterator[str]:
    for name, data in files:
        here = data["machine"]
        yield f"## {machine.sentence(here)}"
        yield f"Measured {data['date']}: [{name}](../benchmarks/results/{name})."
        for figure in plots.figures(data):
            what = plots.AXES[plots.axis_of(figure)]
            yield f"![Time and memory over the {what}](figures/{figure})"
        for regime in REGIMES[here["kind"]]:
            if regime in data:
                yield from _regime(regime, here["kind"], data)


def _regime(regime: str, kind: str, data: dict[str, Any]) -> Iterator[str]:
    found = [f"{k} {v:.0f}" for k, v in data["ceilings"][regime].items() if k != "load"]
    yield f"### {regime}"
    yield f"Ceilings of the newest run, where a share is of its own run's: {', '.join(found)}."
    order = {case.name: i for i, case in enumerate(CASES[kind])}
    pairs = sorted(data[regime].items(), key=lambda pair: order.get(pair[0], len(order)))
    done = [(name, result) for name, result in pairs if "failed" not in result]
    yield _times(done)
    yield from _by_name(done)
    yield from _hosts(done)
    for name, result in pairs:
        if "failed" in result:
            yield f"**{name}: no speed, since its check failed: {result['failed']}.**"


def _times(pairs: list[tuple[str, dict[str, Any]]]) -> str:
    names = [b for b in report.BASELINES if any(b in r["milliseconds"] for _, r in pairs)]
    rows = []
    for case, result in pairs:
        ratios = [report.quantity(name, result) for name in names]
        extra, first = report.extra_mib(result), result["first_call_milliseconds"]["ours"]
        rows.append(
            [
                case,
                _digits(result["milliseconds"]["ours"]),
                *("" if ratio is None else _digits(ratio) for ratio in ratios),
                f"{100 * result['share_of_floor']:.0f} %",
                "" if extra is None else f"{extra:.0f}",
                _digits(first),
                f"{result['gradient_error']:.0e}",
            ]
        )
    ratios_of = [f"{name} / ours" for name in names]
    end = ["of floor", "extra, MiB", "first call, ms", "error"]
    return _table(["case", "ours, ms", *ratios_of, *end], rows)


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.2f}" if number >= 1 else f"{number:.3f}"


def _by_name(pairs: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """Yield a table of kernels called by name, where there are any."""
    rows = [
        [case, role, *(f"{times[k]:.4f}" if k in times else "" for k in ("triton", "compiled"))]
        for case, result in pairs
        for role, times in result.get("implementations", {}).items()
    ]
    if rows:
        yield "Kernels called by name, milliseconds:"
        yield _table(["case", "operator", "triton", "compiled"], rows)


def _hosts(pairs: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    for case, result in pairs:
        if taken := result.get("host_microseconds"):
            words = ", ".join(f"{what} {value:.0f} us" for what, value in taken.items())
            yield f"Host time of {case}, one contender alone: {words}."
