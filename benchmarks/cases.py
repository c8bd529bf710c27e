"""The cases as data: sizes, and the ratios that are asked of some of them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """One size of one loss."""

    name: str
    loss: str  # a function of mtkd.functional
    rows: int
    dims: tuple[int, ...]
    features: int = 0  # width of the student, for fused losses
    sequence: bool = False  # teachers given as separate tensors
    # "<regime> <baseline>" -> how many times faster ours is asked to be
    asked: dict[str, float] = field(default_factory=dict)


def _scaling(loss: str, rows: int, width: int, features: int = 0) -> list[Case]:
    counts = (1, 4, 16, 64, 256, 1024)
    return [Case(f"{loss} T={t}", loss, rows, (width,) * t, features) for t in counts]


G, L = "gaussian_nll", "linear_gaussian_nll"
CASES = (
    Case("gaussian_nll tiny", G, 4, (8,)),
    Case(
        "gaussian_nll 4096 x (4 x 1024)",
        G,
        4096,
        (1024,) * 4,
        asked={"cold eager": 15, "cold compile": 4, "warm eager": 8, "warm compile": 1.8},
    ),
    Case("gaussian_nll 32 x (1024 x 16)", G, 32, (16,) * 1024, asked={"cold loop": 200}),
    Case(
        "gaussian_nll 32 x (1024 x 16), a sequence",
        G,
        32,
        (16,) * 1024,
        sequence=True,
        asked={"cold loop": 4},
    ),
    *_scaling(G, 256, 64),
    Case(
        "linear_gaussian_nll 8192 x (8 x 1024), H=1024",
        L,
        8192,
        (1024,) * 8,
        1024,
        asked={"cold gemms": 1 / 1.08},
    ),
    Case(
        "linear_gaussian_nll 64 x (256 x 64), H=256",
        L,
        64,
        (64,) * 256,
        256,
        asked={"cold gemms": 1 / 1.25, "warm gemms": 1 / 1.25},
    ),
    *_scaling(L, 256, 64, 256),
)
SMALL = tuple(case for case in CASES if case.rows * sum(case.dims) <= 1 << 20)
