"""Plots of a result file: time and memory over the number of teachers and the student's width."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import machine
from .cases import LOSSES

COLORS = {"ours": "#d1335b", "eager": "#2a7fb8", "loop": "#b58900"}
COLORS |= {"compile": "#2e9e5b", "graph": "#7b4fa3"}
FLOOR = "#777777"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
AXES = {"teachers": "number of teachers T", "features": "width of the student H"}
FEWEST = 3  # points that make a curve
Series = list[tuple[int, dict[str, Any]]]


def series(data: dict[str, Any], regime: str, axis: str) -> dict[str, Series]:
    """The longest series of results over a size, all other sizes equal, of each loss."""
    groups: dict[tuple[Any, ...], Series] = defaultdict(list)
    for result in data.get(regime, {}).values():
        size = result.get("size", {})
        if "milliseconds" in result and size.get(axis):
            rest = tuple(sorted((k, v) for k, v in size.items() if k != axis))
            groups[rest].append((size[axis], result))
    longest: dict[str, Series] = {}
    for rest, points in groups.items():
        loss = dict(rest)["loss"]
        if len(points) >= max(FEWEST, len(longest.get(loss, ())) + 1):
            longest[loss] = sorted(points, key=lambda point: point[0])
    return {loss: longest[loss] for loss in LOSSES if loss in longest}


def _regime(data: dict[str, Any]) -> str:
    return "gpu" if "gpu" in data else "warm"


def figures(data: dict[str, Any]) -> dict[str, dict[str, Series]]:
    """The figures that results make: series by loss, by size and by file name."""
    stem = "dry-run" if data.get("dry_run") else machine.slug(data["machine"])
    found = {axis: series(data, _regime(data), axis) for axis in AXES}
    return {f"benchmark-{stem}-{axis}.png": drawn for axis, drawn in found.items() if drawn}


def axis_of(name: str) -> str:
    """The size that a figure has for its horizontal axis, by its file name."""
    return Path(name).stem.rpartition("-")[2]


def draw(path: Path, folder: Path = FIGURES) -> list[Path]:
    """Draw a result file's figures; return their paths."""
    data = json.loads(path.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in figures(data).items():
        _figure(found, axis_of(name), data, folder / name)
    return [folder / name for name in figures(data)]


def _figure(found: dict[str, Series], axis: str, data: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        shape = (2, len(found)) if len(found) > 1 else (1, 2)
        figure, panels = pyplot.subplots(
            *shape,
            figsize=(max(8, 2.6 * shape[1]), 3.1 * shape[0]),
            squeeze=False,
            layout="constrained",
        )
        columns = panels.T if len(found) > 1 else panels
        for (time, memory), (loss, points) in zip(columns, found.items(), strict=True):
            _panel(time, points, axis, _times, "ms")
            _panel(memory, points, axis, _memory, "MiB")
            time.set_title(f"{loss}\n{_fixed(points[0][1]['size'], axis)}", fontsize=10)
            time.set_ylabel("forward + backward, ms")
            memory.set_ylabel("memory of a call, MiB")
        handles = {h.get_label(): h for panel in panels.flat for h in panel.lines}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
        here = data["machine"]
        title = f"{here.get('gpu', here['cpu'])}, {data['date']}, {_regime(data)}"
        if data.get("dry_run"):
            title = "a dry run at tiny sizes: these numbers mean nothing"
        figure.suptitle(title, fontsize=10)
        figure.savefig(target, dpi=150)
        pyplot.close(figure)


def _fixed(size: dict[str, Any], axis: str) -> str:
    words = {"rows": f"N={size['rows']}", "width": f"D_t={size['width']}"}
    words |= {"teachers": f"T={size['teachers']}", "features": f"H={size['features']}"}
    sizes = [text for name, text in words.items() if name != axis and size[name]]
    return ", ".join([size["vote"], *sizes] if "vote" in size else sizes)


def _times(result: dict[str, Any]) -> tuple[dict[str, float], float]:
    return result["milliseconds"], result["floor_milliseconds"]


def _memory(result: dict[str, Any]) -> tuple[dict[str, float | None], float]:
    return result.get("memory_mib", {}), result["gradient_mib"]


def _panel(panel: Any, points: Series, axis: str, numbers: Any, unit: str) -> None:
    """Curves of a panel; the floor is the least time, or the gradients that a call returns."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for x, result in points:
        values, floor = numbers(result)
        curves["floor"].append((x, floor))
        for name in COLORS:
            if values.get(name):
                curves[name].append((x, values[name]))
    for name, points_ in _drawn_last(curves, "ours"):
        look = {"color": COLORS.get(name, FLOOR), "marker": "o", "markersize": 4}
        if name == "floor":
            look |= {"linestyle": "--", "marker": ""}
        panel.plot(
            *zip(*points_, strict=True), label=name, linewidth=2 if name == "ours" else 1.3, **look
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    ticks = [x for x, _ in points]
    panel.set_xticks(ticks, [str(x) for x in ticks])
    panel.minorticks_off()
    low, high = panel.get_ylim()
    if high < 100 * low:  # few decades: numbers between them too
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.set_xlabel(AXES[axis])
    panel.grid(alpha=0.3)


def _drawn_last(curves: dict[str, Any], last: str) -> Iterator[tuple[str, Any]]:
    yield from ((name, points) for name, points in curves.items() if name != last)
    if last in curves:
        yield last, curves[last]
