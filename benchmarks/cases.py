"""The cases as data: sizes, baselines, and what is asked; the most important ones first.

Asked of a case, by regime (cold and warm on a CPU, gpu on a GPU) and quantity, is a least number
for a ratio to a baseline's time or for a share, and a largest one for those in `AT_MOST`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

ROWS, FUSED, ALIGNED = "gaussian_nll", "linear_gaussian_nll", "alignment"
VOTES, MIXED, KL, FUSED_KL = "majority_vote", "mixture_kl", "kl_div", "linear_kl_div"
LOSSES = (ROWS, FUSED, ALIGNED, VOTES, MIXED, KL, FUSED_KL)
# quantities of which little is asked; every other one should be large
AT_MOST = {"milliseconds": "ms", "extra memory": "MiB", "host time": "us"}
ERROR_LIMIT = {32: 1e-5, 16: 2.0}  # relative error; for 16 bits, in units of the least possible
IMPORT_LIMIT = 0.15  # seconds over `import torch`
DRY = (4, 2, 20, 8)  # rows, teachers, width, features: sizes of a dry run
CHECKED = (140, 5, 320, 48)  # of `--check`: little work, more than one tile in each dimension


@dataclass(frozen=True)
class Case:
    """One size of one loss; teachers of a case are equally wide."""

    loss: str
    rows: int
    teachers: int
    width: int
    features: int = 0  # of the student, for fused losses
    modes: int = 0
    masked: bool = False
    sequence: bool = False  # teachers given as separate tensors
    dtype: str = ""  # of inputs, where it is not the device's usual one
    vote: str = ""  # of majority_vote
    baselines: tuple[str, ...] = ()
    asked: dict[str, float] = field(default_factory=dict)  # "<regime> <quantity>" -> number

    @property
    def name(self) -> str:
        """What the case is, in words."""
        words = [f"{self.loss} {self.rows} x ({self.teachers} x {self.width})"]
        words += [f"H={self.features}"] * bool(self.features)
        words += [f"{self.modes} modes"] * bool(self.modes)
        words += [self.vote] * bool(self.vote)
        words += ["masked"] * self.masked + ["a sequence"] * self.sequence
        words += [self.dtype] * bool(self.dtype)
        return ", ".join(words)

    @property
    def dims(self) -> tuple[int, ...]:
        """The width of each teacher."""
        return (self.width,) * self.teachers

    @property
    def numbers(self) -> int:
        """Numbers in one tensor of all teachers' columns."""
        return self.rows * self.teachers * self.width

    @property
    def tiny(self) -> bool:
        """Whether a call is all overhead."""
        return self.numbers <= 64

    def size(self) -> dict[str, Any]:
        """The sizes as JSON keeps them."""
        names = ("rows", "teachers", "width", "features", "modes", "masked", "sequence")
        kind = {"vote": self.vote} if self.vote else {}
        return {"loss": self.loss} | kind | {name: int(getattr(self, name)) for name in names}

    def shrunk(self, rows: int, teachers: int, width: int, features: int) -> "Case":
        """The same, no larger than these sizes."""
        return replace(
            self,
            rows=min(self.rows, rows),
            teachers=min(self.teachers, teachers),
            width=min(self.width, width),
            features=min(self.features, features),
        )

    def wanted(self, regime: str) -> Iterator[tuple[str, float]]:
        """Yield the quantities of which something is asked in a regime, and how much."""
        for key, limit in self.asked.items():
            kind, _, quantity = key.partition(" ")
            if kind == regime:
                yield quantity, limit


def _rows(*size: int, baselines: tuple[str, ...] = ("eager", "loop"), **more: Any) -> Case:
    return Case(ROWS, *size, baselines=baselines, **more)


def _fused(
    *size: int, baselines: tuple[str, ...] = ("eager", "loop", "gemms"), **more: Any
) -> Case:
    return Case(FUSED, *size, baselines=baselines, **more)


def _aligned(*size: int, baselines: tuple[str, ...] = ("eager", "loop"), **more) -> Case:  # type: ignore[no-untyped-def]
    return Case(ALIGNED, *size, baselines=baselines, **more)


def _voted(
    *size: int, vote: str = "each", baselines: tuple[str, ...] = ("eager",), **more: Any
) -> Case:
    return Case(VOTES, *size, vote=vote, baselines=(*baselines, "read"), **more)


def _kl(*size: int, baselines: tuple[str, ...] = ("eager", "loop", "compile"), **more) -> Case:  # type: ignore[no-untyped-def]
    return Case(KL, *size, baselines=baselines, **more)


TEACHERS = (1, 4, 16, 64, 256, 1024)
COMPILED = ("eager", "loop", "compile")
GRAPHED = ("eager", "loop", "graph", "gemms")
HARD_VOTE = {"cold compile": 3.5, "warm compile": 3.5, "cold read": 0.6, "cold extra memory": 16}
SOFT_VOTE = {"cold compile": 4, "warm compile": 2, "cold extra memory": 16}
VOTED = {"each": HARD_VOTE, "plurality": HARD_VOTE, "soft": SOFT_VOTE}

CPU = (
    _rows(4, 1, 8, baselines=COMPILED, asked={"cold host time": 100}),
    _rows(
        4096,
        4,
        1024,
        baselines=COMPILED,
        asked={"cold eager": 15, "cold compile": 4, "warm eager": 8, "warm compile": 1.8},
    ),
    _rows(32, 1024, 16, baselines=COMPILED, asked={"cold loop": 200}),
    _rows(32, 1024, 16, sequence=True, baselines=COMPILED, asked={"cold loop": 4}),
    *(_rows(256, t, 64, baselines=COMPILED) for t in TEACHERS),
    _rows(512, 4, 256, modes=4, baselines=COMPILED),
    _rows(1024, 4, 1024, masked=True, baselines=COMPILED),
    _fused(
        8192,
        8,
        1024,
        1024,
        asked={"cold gemms": 1 / 1.08, "cold extra memory": 96, "warm extra memory": 96},
    ),
    _fused(64, 256, 64, 256, asked={"cold gemms": 0.8, "warm gemms": 0.8}),
    _aligned(
        6304,
        4,
        768,
        baselines=COMPILED,
        asked={
            "cold loop": 20,
            "cold compile": 2.5,
            "cold extra memory": 1,
            "warm loop": 15,
            "warm compile": 2,
            "warm extra memory": 1,
        },
    ),
    _aligned(
        6304,
        4,
        768,
        dtype="bfloat16",
        baselines=(*COMPILED, "float32"),
        asked={"cold float32": 1, "warm float32": 1},
    ),
    *(_aligned(256, t, 64, baselines=COMPILED) for t in TEACHERS if t <= 256),
    *(
        _voted(2048, 32, 1000, vote=vote, baselines=("eager", "compile"), asked=asked)
        for vote, asked in VOTED.items()
    ),
    *(
        _voted(256, t, 100, vote=vote, baselines=("eager", "loop"))
        for vote in ("each", "soft")
        for t in TEACHERS
    ),
    *(
        Case(MIXED, *size, 1000, baselines=("eager", "compile"))
        for size in ((64, 8), (64, 32), (2048, 8), (2048, 32))
    ),
    _kl(4096, 4, 1000, asked={"cold compile": 1.8, "warm compile": 1.8}),
    *(_kl(256, t, 100) for t in TEACHERS),
    _kl(4096, 256, 4),
    Case(
        FUSED_KL,
        8192,
        1,
        21841,
        1024,
        baselines=("gemms",),
        asked={"cold gemms": 1 / 1.15, "cold extra memory": 183, "warm extra memory": 183},
    ),
    *(_fused(256, t, 64, 256) for t in TEACHERS),
    *(_fused(512, 8, 128, h) for h in (64, 128, 256, 512, 1024)),
)

GPU = (
    _fused(8192, 8, 1024, 1024, asked={"gpu gemms": 0.85, "gpu extra memory": 256}),
    _fused(8192, 8, 1024, 4096, asked={"gpu gemms": 0.92, "gpu extra memory": 256}),
    _fused(
        512,
        256,
        64,
        768,
        baselines=GRAPHED,
        asked={"gpu milliseconds": 0.25, "gpu loop": 100, "gpu graph": 20},
    ),
    _rows(8192, 8, 1024, baselines=COMPILED, asked={"gpu floor": 0.85, "gpu compile": 1.3}),
    _rows(4, 1, 8, asked={"gpu host time": 80}),
    _aligned(25216, 4, 768, baselines=COMPILED),
    *(_voted(4096, 32, 1000, vote=vote, baselines=("eager", "compile")) for vote in VOTED),
    _fused(4, 1, 8, 8),
    _rows(512, 1024, 16, baselines=(*COMPILED, "graph")),
    _rows(4096, 8, 512, modes=4, baselines=COMPILED),
    _rows(8192, 8, 1024, masked=True, baselines=COMPILED),
    _fused(4096, 8, 512, 1024, modes=4),
    _fused(8192, 8, 1024, 1024, masked=True),
    *(_fused(8192, 8, 1024, h) for h in (256, 512, 2048)),
    *(_fused(512, t, 64, 768) for t in TEACHERS if t != 256),
    *(_rows(2048, t, 64) for t in TEACHERS),
    _rows(16, 1, 8192),
    _rows(64, 8, 1024, sequence=True),
)

CASES = {"cpu": CPU, "cuda": GPU}
REGIMES = {"cpu": ("cold", "warm"), "cuda": ("gpu",)}
SMALL = tuple(case for case in CPU if case.numbers <= 1 << 20)
