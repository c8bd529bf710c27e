"""One flat JSON a machine and date: every result is added at once, so that nothing is lost."""

import json
from datetime import date
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
UNFINISHED = "did not finish"


class Store:
    """A file of results: regime -> case -> result."""

    def __init__(self, path: Path, machine: dict[str, Any], again: bool = False, **facts: Any):
        self.path, self.again = path, again
        self.facts = facts | {"machine": machine, "date": str(date.today())}

    def read(self) -> dict[str, Any]:
        """All of it."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, section: str, key: str, entry: Any) -> None:
        """Add one result; the file is whole at any moment."""
        data = self.read() | self.facts
        data.setdefault(section, {})[key] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
        draft.replace(self.path)

    def begin(self, section: str, key: str) -> None:
        """Note that a result is being made, for whoever finds the file if that never ends."""
        if not self.done(section, key):
            self.add(section, key, {"failed": UNFINISHED})

    def tried(self, section: str, key: str) -> bool:
        """Whether there is a result, good or not."""
        return key in self.read().get(section, {})

    def done(self, section: str, key: str) -> bool:
        """Whether there is a good result."""
        return "failed" not in self.read().get(section, {}).get(key, {"failed": ""})


def path_of(folder: Path, slug: str) -> Path:
    """The file of a machine today."""
    return folder / f"{date.today()}-{slug}.json"


def committed(folder: Path = FOLDER) -> list[tuple[str, dict[str, Any]]]:
    """Names and contents of result files, the newest of each machine, GPUs first."""
    newest = {path.name[11:]: path for path in sorted(folder.glob("*.json"))}
    found = [(path.name, json.loads(path.read_text())) for path in newest.values()]
    found = [(name, data) for name, data in found if not data.get("dry_run")]
    return sorted(found, key=lambda pair: (pair[1]["machine"]["kind"] == "cpu", pair[0]))
