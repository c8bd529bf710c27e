"""Results as a table on screen and one JSON file a machine and date."""

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

from .cases import Case

BASELINES = ("eager", "loop", "compile", "gemms")


def path_of(folder: Path, machine: dict[str, Any]) -> Path:
    """The file of this machine today."""
    words = f"{machine['cpu']} {machine['cpu_family_model']}"
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return folder / f"{date.today()}-{slug}-{machine['threads']}t.json"


def add(path: Path, machine: dict[str, Any], section: str, key: str, entry: Any) -> None:
    """Add one result at once, so that an interrupted run keeps what it has."""
    data = json.loads(path.read_text()) if path.exists() else {}
    data["machine"] = machine
    data.setdefault(section, {})[key] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def header() -> str:
    """The table's first line."""
    names = "".join(f"{name:>18}" for name in BASELINES)
    return f"{'case':48}{'ours':>9}{names}{'of floor':>9}{'extra':>8}{'error':>9}"


def line(case: Case, result: dict[str, Any]) -> str:
    """A row: milliseconds, and in brackets how many times faster ours is."""
    times = result["milliseconds"]
    cells = []
    for name in BASELINES:
        ratio = f"({times[name] / times['ours']:.2f}x)" if name in times else ""
        cells.append(f"{times[name]:>9.2f} {ratio:>8}" if name in times else f"{'-':>18}")
    extra = result["extra_mib"]
    memory = "-" if extra is None else f"{extra:.0f}M"
    share = f"{100 * result['share_of_floor']:.0f}%"
    ours = f"{times['ours']:>9.2f}"
    error = f"{result['gradient_error']:.0e}"
    return f"{case.name:48}{ours}{''.join(cells)}{share:>9}{memory:>8}{error:>9}"


def asked(case: Case, regime: str, result: dict[str, Any]) -> list[str]:
    """How the ratios asked of a case stand."""
    times = result["milliseconds"]
    rows = []
    for key, wanted in case.asked.items():
        kind, baseline = key.split()
        if kind == regime and baseline in times:
            got = times[baseline] / times["ours"]
            verdict = "reached" if got >= wanted else "NOT reached"
            rows.append(f"    asked {wanted:.2f}x of {baseline}: {got:.2f}x, {verdict}")
    return rows


def markdown(path: Path) -> str:
    """The results of a file as Markdown tables, one a regime."""
    data = json.loads(path.read_text())
    machine = data["machine"]
    text = [
        f"Measured {path.name[:10]} on {machine['cpu']} ({machine['cores']} cores, SIMD"
        f" {machine['simd']}), {machine['threads']} threads, torch {machine['torch']}.\n"
    ]
    for regime in ("cold", "warm"):
        probes = ", ".join(f"{k} {v:.0f}" for k, v in data["probes"][regime].items() if k != "load")
        names = " | ".join(f"{name} / ours" for name in BASELINES)
        text += [f"### {regime}\n", f"Ceilings of the run: {probes}.\n"]
        text += [f"| case | ours, ms | {names} | of floor | extra, MiB |"]
        text += ["|---|---|" + "---|" * (len(BASELINES) + 2)]
        for case, result in data[regime].items():
            times = result["milliseconds"]
            ratios = [f"{times[b] / times['ours']:.2f}" if b in times else "" for b in BASELINES]
            share, extra = f"{100 * result['share_of_floor']:.0f} %", f"{result['extra_mib']:.0f}"
            cells = [case, f"{times['ours']:.2f}", *ratios, share, extra]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    if "imports" in data:
        taken = data["imports"]["seconds"]
        text.append(
            f"`import torch` takes {taken['torch']:.2f} s; `import mtkd.functional` adds"
            f" {taken['mtkd.functional']:.3f} s."
        )
    return "\n".join(text)
