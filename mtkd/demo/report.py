"""What came out: a table, sentences made from the numbers, a JSON file, and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .experiment import Outcome, Settings
from .probes import PROBES
from .students import LOSSES
from .teachers import TEACHERS, Array

TITLES = {
    "untrained": "student, untrained",
    "cosine": "student, cosine",
    "mse": "student, MSE",
    "gaussian": "student, Gaussian NLL",
}
COLORS = {"untrained": "#b58900", "cosine": "#2a7fb8", "mse": "#2e9e5b", "gaussian": "#d1335b"}


def collect(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Array]]:
    """Scores as `[embedding][probe]`, one value a seed."""
    return {
        name: {key: np.array([o.scores[name][key] for o in outcomes]) for key in PROBES}
        for name in [*TEACHERS, *TITLES]
    }


def spread(values: Array) -> float | None:
    """Sample standard deviation over seeds; None for one seed, which shows no spread."""
    return float(values.std(ddof=1)) if len(values) > 1 else None


def shown(values: Array) -> str:
    """Mean and spread over seeds as text."""
    deviation = spread(values)
    return f"{values.mean():.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def table(
    scores: dict[str, dict[str, Array]],
    dims: dict[str, int],
    width: int,
    probes: Mapping[str, str] = PROBES,
) -> str:
    """Rows of `mean ± deviation`; `*` marks the best teacher and the best loss of each column."""
    best = {
        (max(group, key=lambda name: scores[name][key].mean()), key)
        for group in (list(dims), list(LOSSES))
        for key in probes
    }
    lines = [f"{'':28}{'width':>5}  " + "".join(f"{key:>16} " for key in probes)]
    for name, row in scores.items():
        cells = [shown(row[key]) + ("*" if (name, key) in best else " ") for key in probes]
        title = TITLES.get(name, f"teacher, {name}")
        lines.append(f"{title:28}{dims.get(name, width):>5}  " + "".join(f"{c:>17}" for c in cells))
        if name == list(dims)[-1]:
            lines.append("-" * len(lines[0]))
    legend = [f"{key}: {text}" for key, text in probes.items()]
    return "\n".join([*lines, "; ".join(legend), "* best teacher, best loss; higher is better"])


def verdict(scores: dict[str, dict[str, Array]], probes: Mapping[str, str] = PROBES) -> str:
    """Where the Gaussian loss is ahead of the others and where behind, by paired differences.

    Every difference is listed by its sign, so that no loss hides behind a threshold; "clear" marks
    those beyond two standard errors over seeds. One seed has no standard error, and none is clear.
    """
    ours = scores["gaussian"]
    teachers = [name for name in scores if name not in TITLES]
    words: dict[str, list[str]] = {"ahead": [], "behind": [], "equal": []}
    for key in probes:
        for other in LOSSES[1:]:
            gap = ours[key] - scores[other][key]
            side = "ahead" if gap.mean() > 0 else "behind" if gap.mean() < 0 else "equal"
            words[side].append(f"{key} against {other} ({_difference(gap)})")
    seeds = len(next(iter(ours.values())))
    rule = "one seed, so none of this is evidence yet"
    if seeds > 1:
        rule = f"mean of {seeds} paired seeds ± standard error; clear: beyond two of them"
    passed = [
        f"{sum(ours[key].mean() > scores[name][key].mean() for name in teachers)} on {key}"
        for key in probes
    ]
    lines = [f"  {word} on {', '.join(items) or 'nothing'}" for word, items in words.items()]
    return (
        f"The Gaussian loss ({rule}) is\n"
        + ";\n".join(lines)
        + f".\nOf {len(teachers)} teachers its student passes {', '.join(passed)}."
    )


def _difference(gap: Array) -> str:
    deviation = spread(gap)
    if deviation is None:
        return f"{gap.mean():+.3f}"
    error = deviation / len(gap) ** 0.5
    return f"{gap.mean():+.3f} ± {error:.3f}" + (", clear" if abs(gap.mean()) > 2 * error else "")


def write_json(path: Path, settings: Settings, outcomes: Sequence[Outcome], seconds: float) -> None:
    """Settings, sizes, every seed's scores, their mean and spread."""
    scores = collect(outcomes)
    summary: dict[str, Any] = {
        name: {
            key: {"mean": float(v.mean()), "std": spread(v), "seeds": v.tolist()}
            for key, v in row.items()
        }
        for name, row in scores.items()
    }
    content = {
        "settings": asdict(settings),
        "probes": PROBES,
        "teacher_widths": outcomes[0].dims,
        "head_parameters": outcomes[0].head_parameters,
        "scores": summary,
        "verdict": verdict(scores),
        "seconds": round(seconds, 1),
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw(path: Path, scores: dict[str, dict[str, Array]], dims: dict[str, int]) -> None:
    """One panel a probe, one row an embedding: mean and spread over seeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(scores)[::-1]
    rows = [i + 0.6 * (name in TEACHERS) for i, name in enumerate(names)]
    figure, axes = pyplot.subplots(1, len(PROBES), sharey=True, figsize=(11, 4.6))
    for axis, (key, title) in zip(axes, PROBES.items(), strict=True):
        for row, name in zip(rows, names, strict=True):
            values, color = scores[name][key], COLORS.get(name, "#777777")
            axis.errorbar(
                values.mean(), row, xerr=spread(values), fmt="o", color=color, markersize=6
            )
        axis.axvline(scores["gaussian"][key].mean(), color=COLORS["gaussian"], lw=0.8, alpha=0.5)
        axis.set_title(title, fontsize=11)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(rows, [TITLES.get(n) or f"{n} ({dims[n]})" for n in names], fontsize=11)
    for label, name in zip(axes[0].get_yticklabels(), names, strict=True):
        label.set_color(COLORS.get(name, "#444444"))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
