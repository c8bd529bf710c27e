"""What a result says: cells of tables, and how it stands to what is asked."""

from collections.abc import Iterator
from typing import Any

from .cases import AT_MOST, Case

BASELINES = ("eager", "loop", "compile", "graph", "gemms", "read", "float32")
MIB = 2**20
TOTAL = "forward + backward"


def quantity(name: str, result: dict[str, Any]) -> float | None:
    """The number of a result that a quantity of `Case.asked` names; None where it has none."""
    times = result.get("milliseconds", {})
    if "ours" not in times:
        return None
    if name == "floor":
        return result["share_of_floor"]
    if name == "milliseconds":
        return times["ours"]
    if name == "extra memory":
        return extra_mib(result)
    if name == "host time":
        return result.get("host_microseconds", {}).get(TOTAL)
    return times[name] / times["ours"] if name in times else None


def extra_mib(result: dict[str, Any]) -> float | None:
    """Memory that a call takes beside inputs and gradients."""
    peak = result.get("memory_mib", {}).get("ours")
    return None if peak is None else max(0.0, peak - result["gradient_mib"])


def meets(name: str, got: float, limit: float) -> bool:
    """Whether a quantity is as asked."""
    return got <= limit if name in AT_MOST else got >= limit


def shown(name: str, value: float) -> str:
    """A quantity as text, with its unit."""
    if name in AT_MOST:
        return f"{value:.3g} {AT_MOST[name]}" if value < 100 else f"{value:.0f} {AT_MOST[name]}"
    if name in ("gemms", "floor", "read"):
        return f"{100 * value:.1f} %"
    return f"{value:.3g} x" if value < 100 else f"{value:.0f} x"


WORDS = {
    "gemms": "of its three GEMMs' speed",
    "floor": "of the copy floor",
    "read": "of a bare read's speed",
    "graph": "faster than the loop in a CUDA graph",
    "compile": "faster than torch.compile",
    "float32": "faster than with float32 inputs",
    "extra memory": "extra memory",
    "host time": "host time",
    "milliseconds": "time",
}


def wording(name: str) -> str:
    """A quantity in words."""
    return WORDS.get(name, f"faster than {name}")


def standing(case: Case, regime: str, result: dict[str, Any]) -> Iterator[str]:
    """Yield how what is asked of a case stands, a line each."""
    for name, limit in case.wanted(regime):
        got = quantity(name, result)
        if got is not None:
            verdict = "reached" if meets(name, got, limit) else "NOT reached"
            text = f"{wording(name)}: {shown(name, got)}"
            yield f"    {text}, asked {shown(name, limit)}, {verdict}"


def header() -> str:
    """The table's first line on screen."""
    names = "".join(f"{name:>19}" for name in BASELINES)
    return f"{'case':50}{'ours, ms':>9}{names}{'of floor':>9}{'extra':>8}{'error':>9}"


def line(case: Case, result: dict[str, Any]) -> str:
    """A row on screen: milliseconds, and in brackets how many times faster ours is."""
    times = result["milliseconds"]
    cells = []
    for name in BASELINES:
        ratio = quantity(name, result)
        text = "-" if ratio is None else f"{times[name]:.3f} ({ratio:.2f}x)"
        cells.append(f"{text:>19}")
    extra = extra_mib(result)
    memory = "-" if extra is None else f"{extra:.0f}M"
    share = f"{100 * result['share_of_floor']:.0f}%"
    ours, error = f"{times['ours']:>9.3f}", f"{result['gradient_error']:.0e}"
    return f"{case.name:50}{ours}{''.join(cells)}{share:>9}{memory:>8}{error:>9}"


def errors(result: dict[str, Any]) -> str:
    """The errors of a result in words."""
    named = {"ours": result["of_allowed"]} | result.get("of_allowed_by_implementation", {})
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in named.items())
    return f"error {result['gradient_error']:.1e}; of what is allowed: {shares}"


def details(result: dict[str, Any]) -> Iterator[str]:
    """Yield what else a result has to say, a line each."""
    for role, times in result.get("implementations", {}).items():
        yield "    " + role + ": " + ", ".join(f"{k} {v:.4f} ms" for k, v in times.items())
    for what, taken in result.get("host_microseconds", {}).items():
        yield f"    host time, {what}: {taken:.1f} us"
    for name, why in result["skipped"].items():
        yield f"    {name} left out: {why}"
