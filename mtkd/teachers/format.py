"""What a store's folder holds, and the checks of an index that somebody else may have written."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

FORMAT, VERSION = "mtkd.teachers", 1
INDEX = "index.json"
LARGEST_INDEX = 1 << 24  # bytes
_MOST_SAID = 8  # teachers, or differences, in one line
_MOST = 1 << 48  # rows, and columns

# How the numbers of each dtype lie in values.npy.
STORED: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("|i1"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Teacher:
    """One teacher of a store: its name, width, stored dtype, and the model's revision."""

    name: str
    dim: int
    dtype: str = "float16"
    revision: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        _check_count(f"dim of {self.name}", self.dim)
        if not isinstance(self.dtype, str) or self.dtype not in STORED:
            known = ", ".join(STORED)
            raise ValueError(f"dtype of {self.name}: expected one of {known}, got {self.dtype!r}")
        if self.revision is not None and not isinstance(self.revision, str):
            kind = type(self.revision).__name__
            raise ValueError(f"revision of {self.name}: expected a string or None, got {kind}")

    def files(self, rows: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each file in the teacher's folder."""
        files: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "values.npy": (STORED[self.dtype], (rows, self.dim)),
            "checksums.npy": (np.dtype("<u4"), (rows,)),
            "present.npy": (np.dtype("|u1"), (rows,)),
        }
        if self.dtype == "int8":
            files["scales.npy"] = (np.dtype("<f4"), (rows,))
        return files


@dataclass(frozen=True)
class Index:
    """What index.json says: the number of rows, the hash of their ids, the teachers in order."""

    rows: int
    teachers: tuple[Teacher, ...]
    ids: str | None = None

    def __post_init__(self) -> None:
        _check_count("rows", self.rows)
        if self.ids is not None and not (isinstance(self.ids, str) and len(self.ids) == 64):
            raise ValueError(f"ids: expected a sha256 in hexadecimal or None, got {self.ids!r:.80}")
        if not self.teachers:
            raise ValueError("teachers: expected at least one, got none")
        seen: set[str] = set()
        for name in (teacher.name for teacher in self.teachers):
            if name.lower() in seen:
                raise ValueError(f"teachers: expected names that differ, got {name} twice")
            seen.add(name.lower())

    def dump(self) -> bytes:
        """The content of index.json."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "rows": self.rows,
            "ids": self.ids,
            "teachers": [asdict(teacher) for teacher in self.teachers],
        }
        return json.dumps(content | {"checksum": _checksum(content)}, indent=1).encode()

    @classmethod
    def load(cls, data: bytes) -> "Index":
        """Parse and check the content of index.json; every fault is a ValueError."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected JSON, got {error}") from None
        keys = {"format", "version", "rows", "ids", "teachers", "checksum"}
        _check_keys("the index", content, keys)
        version = content["version"]
        if content["format"] != FORMAT or version != VERSION or type(version) is not int:
            got = f"{content['format']!r:.40} version {version!r:.40}"
            raise ValueError(f"format: expected {FORMAT} version {VERSION}, got {got}")
        try:
            claimed, actual = content.pop("checksum"), _checksum(content)
        except RecursionError as error:  # writing takes more depth than reading
            raise ValueError(
                f"expected an index, got one that is nested too deep: {error}"
            ) from None
        if claimed != actual:
            raise ValueError(f"checksum: expected {actual} for what it says, got {claimed!r:.80}")
        if not isinstance(content["teachers"], list):
            kind = type(content["teachers"]).__name__
            raise ValueError(f"teachers: expected a list, got {kind}")
        for teacher in content["teachers"]:
            _check_keys("a teacher", teacher, {"name", "dim", "dtype", "revision"})
        teachers = tuple(Teacher(**teacher) for teacher in content["teachers"])
        return cls(content["rows"], teachers, content["ids"])


_Pair = tuple[str, Any, Any]  # what it is, expected, found


def compare(expected: Index, found: Index, more: bool = False) -> str:
    """What a store has that was not expected, field by field; "" if it is the same.

    With `more` it may have other teachers besides, and in another order.
    """
    wanted, there = ({each.name: each for each in index.teachers} for index in (expected, found))
    missing = [name for name in wanted if name not in there]
    besides = [name for name in there if name not in wanted and not more]
    pairs: list[_Pair] = [
        ("rows", expected.rows, found.rows),
        ("hash of ids", expected.ids, found.ids),
        ("other teachers", missing, besides),
    ]
    if not (missing or besides or more):
        moved = [names for names in zip(wanted, there, strict=True) if names[0] != names[1]]
        pairs.append(("order of teachers", [a for a, _ in moved], [b for _, b in moved]))
    for name in (name for name in wanted if name in there):
        pairs += _fields(wanted[name], there[name])
    return _say(pairs)


def compare_teachers(expected: Teacher, found: Teacher) -> str:
    """What a teacher of the same name has otherwise than expected; "" if it is the same."""
    return _say(_fields(expected, found))


def _fields(expected: Teacher, found: Teacher) -> list[_Pair]:
    names = [field.name for field in fields(Teacher)]
    of = expected.name
    return [(f"{name} of {of}", getattr(expected, name), getattr(found, name)) for name in names]


def _say(pairs: list[_Pair]) -> str:
    said = [f"{what}: expected {_short(a)}, got {_short(b)}" for what, a, b in pairs if a != b]
    return join_some(said, "; ")


def _short(value: Any) -> str:
    return join_some(value, ", ") or "none" if isinstance(value, list) else f"{value!r:.200}"


def join_some(texts: list[str], between: str) -> str:
    """Join the first few of many texts, and say how many there are more."""
    rest = [f"{len(texts) - _MOST_SAID} more"] if len(texts) > _MOST_SAID else []
    return between.join(texts[:_MOST_SAID] + rest)


def hash_ids(ids: Iterable[str | int]) -> str:
    """Return the sha256 of row ids, strings or integers, in their order; an array counts too."""
    digest = hashlib.sha256()
    for position, each in enumerate(list_ids(ids)):
        if not isinstance(each, (str, int)):
            kind = type(each).__name__
            raise TypeError(f"ids[{position}]: expected a string or an integer, got {kind}")
        text = str(each).encode()
        digest.update(b"%d:%b," % (len(text), text))
    return digest.hexdigest()


def list_ids(ids: Any) -> list[Any]:
    """The row ids of an argument `ids`; those of an array or a tensor as Python has them."""
    if not isinstance(ids, Iterable):
        raise TypeError(f"ids: expected strings or integers, got {type(ids).__name__}")
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return [each.item() if isinstance(each, np.generic) else each for each in ids]


def make_teachers(dims: Any, dtype: Any, revision: Any) -> tuple[Teacher, ...]:
    """Check arguments that say the width, dtype and revision of teachers by name."""
    if not isinstance(dims, Mapping):
        kind = type(dims).__name__
        raise TypeError(f"dims: expected a mapping name -> width, got {kind}")
    if not isinstance(revision, (Mapping, type(None))):
        kind = type(revision).__name__
        raise TypeError(f"revision: expected a mapping name -> revision, got {kind}")
    for name, argument in (("dtype", dtype), ("revision", revision)):
        unknown = (
            [key for key in argument if key not in dims] if isinstance(argument, Mapping) else []
        )
        if unknown:
            raise ValueError(f"{name}: expected some of the teachers {list(dims)}, got {unknown}")
    kinds = dtype if isinstance(dtype, Mapping) else dict.fromkeys(dims, dtype)
    made = revision or {}
    # A torch.dtype's own name is like ours.
    stored = {name: str(kinds.get(name, "float16")).removeprefix("torch.") for name in dims}
    return tuple(
        Teacher(name, plain(dim), stored[name], made.get(name)) for name, dim in dims.items()
    )


def plain(number: Any) -> Any:
    """One of NumPy's integers as Python's; all else as it is."""
    return int(number) if isinstance(number, np.integer) else number


def check_name(name: Any) -> None:
    """Raise ValueError unless a teacher's name can be the name of a folder."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() == INDEX:
        raise ValueError(
            "teachers: expected names of at most 100 letters, digits, '.', '_' and '-', that begin"
            f" with a letter or digit, got {name!r:.120}"
        )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST:
        raise ValueError(f"{name}: expected a positive integer, got {value!r:.80}")


def _check_keys(name: str, value: Any, keys: set[str]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, got {type(value).__name__}")
    if value.keys() != keys:
        raise ValueError(f"{name}: expected the keys {sorted(keys)}, got {sorted(value)!r:.200}")


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
