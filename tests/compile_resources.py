"""What a compiled kernel takes of a card: read from binaries, judged by limits, kept on disk."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

# Shared memory that one block may take, in KiB.
SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_90a": 227, "sm_100": 227, "gfx942": 64}


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one target: registers a thread; bytes spilled a thread; shared bytes."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int

    def excess(self) -> str | None:
        """What is wrong with it; None if it fits the card."""
        limit = SHARED_LIMIT[self.target] * 1024
        if self.spills:
            return f"{self.spills} bytes of a thread's registers spilled to memory"
        if self.shared > limit:
            return f"{self.shared} bytes of shared memory, where {limit} is the most"
        return None


def of_nvidia(binary: Path, target: str = "") -> list[Resources]:
    """Resources of every kernel in a cubin for `target`, or in an object file that names its own.

    Shared memory is the static part; a stack frame counts as spilled.
    """
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    return parse_cuobjdump(subprocess.check_output(command, text=True), target)


def parse_cuobjdump(text: str, target: str = "") -> list[Resources]:
    """Read what ``cuobjdump -res-usage`` printed."""
    found = []
    usage = r"arch = (\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for architecture, kernel, *numbers in re.findall(usage, text):
        if architecture:
            target = architecture
        else:
            registers, stack, shared, local = map(int, numbers)
            found.append(Resources(kernel, target, registers, stack + local, shared))
    return found


def of_amd(assembly: str, target: str) -> Resources:
    """Resources of the kernel in an assembly text.

    Scratch memory that is reserved but that no instruction touches is not a spill: scalar
    registers went into lanes of vector registers.
    """
    facts = dict(re.findall(r"^ +\.(\w+): +(\w+)$", assembly, re.MULTILINE))
    touched = re.search(r"^\s+scratch_(load|store)", assembly, re.MULTILINE)
    return Resources(
        facts["name"],
        target,
        int(facts["vgpr_count"]),
        int(facts["private_segment_fixed_size"]) if touched else 0,
        int(facts["group_segment_fixed_size"]),
    )


def kept(
    file: Path, compute: Callable[[], Sequence[Resources]]
) -> tuple[Sequence[Resources], bool]:
    """Return what `compute` gives, and whether `file` knew it already."""
    if file.exists():
        return [Resources(**entry) for entry in json.loads(file.read_text())], True
    found = compute()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([asdict(entry) for entry in found]))
    partial.replace(file)  # at once: an interrupted run leaves no half a file
    return found, False
