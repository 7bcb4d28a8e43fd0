"""Expected times of the CUDA backend, as data: what measured ones are held against. Nothing here was measured by us.

Ceilings were measured elsewhere. Floors follow from the ceilings by arithmetic (`product_us`, `gather_us`, `read_us`).
Predictions were counted from the kernels as they are; goals are what they are to reach, first now, then later. All
are for an NVIDIA H200 at 1.755 GHz, K = 10, and come from the kernels' design notes. Times are microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DEVICE = "NVIDIA H200"
K = 10

# predicted: of the kernels as they are. goal, later: what they are to reach. floor: what no kernel can beat.
Source = Literal["floor", "predicted", "goal", "later"]

# --------------------------------------------------------------------------------------------------
# Ceilings
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceiling:
    """What the device can do at all: seconds, bytes or floating-point operations a second."""

    unit: Literal["s", "B/s", "FLOP/s"]
    value: float
    what: str


CEILINGS: dict[str, Ceiling] = {
    "null_kernel": Ceiling("s", 2e-6, "launch of a kernel that does nothing"),
    "graph_gap": Ceiling("s", 1.25e-6, "between two kernels of a graph; 1 to 1.5 us"),
    "copy": Ceiling("B/s", 4.3e12, "memory, bytes read and bytes written"),
    "l2": Ceiling("B/s", 5.5e12, "reads from the L2; 5.5 to 6.3 TB/s"),
    "fp32": Ceiling("FLOP/s", 50e12, "cuBLAS X @ X.T"),
    "tf32": Ceiling("FLOP/s", 386e12, "cuBLAS X @ X.T"),
    "fp16": Ceiling("FLOP/s", 892e12, "cuBLAS X @ X.T"),
    "bf16": Ceiling("FLOP/s", 790e12, "cuBLAS X @ X.T"),
}

# --------------------------------------------------------------------------------------------------
# Floors
# --------------------------------------------------------------------------------------------------

# FLOP/s at which products could be made by our kernels: multiply-add units, tensor cores, and fp32 as three products
# of halves. The first is the device's peak, which cuBLAS does not reach.
RATES: dict[str, float] = {
    "fp32": 67e12,
    "tf32": CEILINGS["tf32"].value,
    "half": CEILINGS["bf16"].value,
    "split": CEILINGS["bf16"].value / 3,
}


def product_us(N: int, M: int, D: int, arithmetic: str, symmetric: bool = False) -> float:
    """All N x M products of rows of D elements. `symmetric`: half of them are enough. Raises KeyError for an
    arithmetic that is not in RATES."""
    return 2.0 * N * M * D / RATES[arithmetic] * (0.5 if symmetric else 1.0) * 1e6


def read_us(rows: int, D: int, element_bytes: int = 4) -> float:
    """Reading (or writing) rows of D elements once."""
    return rows * D * element_bytes / CEILINGS["copy"].value * 1e6


def backward_us(N: int, D: int, element_bytes: int = 4) -> float:
    """Reading X and writing its gradient: the least that a backward moves."""
    return 2 * read_us(N, D, element_bytes)


def gather_us(N: int, D: int, k: int = K, element_bytes: int = 4) -> float:
    """The sparse backward's gather from the L2: both ends of k + 2 edges an anchor."""
    return 2 * (k + 2) * N * D * element_bytes / CEILINGS["l2"].value * 1e6


# --------------------------------------------------------------------------------------------------
# Predictions and goals
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One stated time. `M` is N in the self case; `bank`: candidates with labels of their own. `path` is the one it is
    stated for ("" is whichever the planner takes) and `kernel` the stage ("" is everything). "backward" is backward
    alone, "both" forward and backward. `note` has the range where one was stated, whose middle is `us`."""

    N: int
    M: int
    D: int
    dtype: str
    scope: Literal["forward", "backward", "both"]
    source: Source
    us: float
    bank: bool = False
    path: str = ""
    kernel: str = ""
    how: Literal["graph", "called"] = "graph"
    note: str = ""


def _halves(N: int, D: int, scope: Literal["forward", "backward", "both"], source: Source, us: float) -> list[Figure]:
    """The same figure of both half-precision types, self case."""
    return [Figure(N, N, D, dtype, scope, source, us) for dtype in ("float16", "bfloat16")]


FIGURES: tuple[Figure, ...] = (
    # 64 x 2048
    Figure(64, 64, 2048, "float32", "both", "predicted", 24, path="cluster", note="8 of 132 multiprocessors"),
    Figure(64, 64, 2048, "float32", "both", "predicted", 13, path="direct"),
    Figure(64, 64, 2048, "float32", "both", "goal", 12),
    Figure(64, 64, 2048, "float32", "both", "later", 8),
    Figure(64, 64, 2048, "float32", "both", "floor", 6),
    Figure(64, 64, 2048, "float32", "forward", "goal", 6.5, note="one launch of 16 clusters"),
    # 128 x 2048
    Figure(128, 128, 2048, "float32", "both", "predicted", 21, note="18 to 25"),
    Figure(128, 128, 2048, "float32", "both", "goal", 14),
    Figure(128, 128, 2048, "float32", "both", "later", 12),
    Figure(128, 128, 2048, "float32", "both", "floor", 7),
    Figure(128, 128, 2048, "float32", "forward", "predicted", 6.7, kernel="select"),
    Figure(128, 128, 2048, "float32", "forward", "goal", 8.4, note="one launch of 16 clusters"),
    Figure(128, 128, 2048, "float32", "backward", "goal", 3.4),
    Figure(128, 128, 2048, "float32", "both", "predicted", 66, how="called", note="62 to 70"),
    Figure(128, 128, 2048, "float32", "both", "goal", 30, how="called"),
    Figure(128, 128, 2048, "float32", "both", "later", 20, how="called"),
    # 256 x 2048
    Figure(256, 256, 2048, "float32", "both", "predicted", 31),
    Figure(256, 256, 2048, "float32", "both", "goal", 25),
    Figure(256, 256, 2048, "float32", "both", "later", 18),
    Figure(256, 256, 2048, "float32", "both", "floor", 11),
    # 1024 x 2048
    Figure(1024, 1024, 2048, "float32", "both", "predicted", 127),
    Figure(1024, 1024, 2048, "float32", "both", "goal", 70),
    Figure(1024, 1024, 2048, "float32", "both", "later", 60),
    Figure(1024, 1024, 2048, "float32", "both", "floor", 55),
    Figure(1024, 1024, 2048, "float32", "forward", "predicted", 30, kernel="refine"),
    # 8192 x 512
    Figure(8192, 8192, 512, "float32", "forward", "predicted", 260),
    Figure(8192, 8192, 512, "float32", "backward", "predicted", 95),
    Figure(8192, 8192, 512, "float32", "forward", "goal", 139),
    Figure(8192, 8192, 512, "float32", "forward", "later", 104),
    Figure(8192, 8192, 512, "float32", "forward", "floor", 90),
    Figure(8192, 8192, 512, "float32", "forward", "predicted", 110, kernel="scores"),
    Figure(8192, 8192, 512, "float32", "forward", "predicted", 65, kernel="refine"),
    Figure(8192, 8192, 512, "float32", "forward", "predicted", 30, kernel="thresholds"),
    Figure(8192, 8192, 512, "float32", "forward", "goal", 4, kernel="thresholds"),
    # 8192 x 2048
    Figure(8192, 8192, 2048, "float32", "both", "predicted", 1100),
    Figure(8192, 8192, 2048, "float32", "both", "goal", 1370, note="0.25 of one cuBLAS fp32 X @ X.T"),
    Figure(8192, 8192, 2048, "float32", "both", "later", 990, note="0.18 of one cuBLAS fp32 X @ X.T"),
    Figure(8192, 8192, 2048, "float32", "both", "floor", 600),
    Figure(8192, 8192, 2048, "float32", "forward", "predicted", 395, kernel="scores", note="370 to 420"),
    Figure(8192, 8192, 2048, "float32", "forward", "predicted", 250, kernel="refine"),
    *_halves(8192, 2048, "forward", "predicted", 650),
    *_halves(8192, 2048, "backward", "predicted", 180),
    *_halves(8192, 2048, "forward", "goal", 470),
    *_halves(8192, 2048, "forward", "later", 310),
    *_halves(8192, 2048, "forward", "floor", 250),
    # 65536 x 128
    Figure(65536, 65536, 128, "bfloat16", "forward", "predicted", 4800),
    Figure(65536, 65536, 128, "bfloat16", "forward", "goal", 1900),
    Figure(65536, 65536, 128, "bfloat16", "forward", "later", 1600),
    Figure(65536, 65536, 128, "bfloat16", "forward", "floor", 750),
    Figure(65536, 65536, 128, "bfloat16", "forward", "predicted", 3300, kernel="scores", note="its epilogue"),
    Figure(65536, 65536, 128, "bfloat16", "forward", "later", 1100, kernel="scores", note="1000 to 1200, main loop"),
    Figure(65536, 65536, 128, "bfloat16", "forward", "predicted", 600, kernel="thresholds"),
    Figure(65536, 65536, 128, "bfloat16", "forward", "goal", 60, kernel="thresholds", note="from 420"),
    # 65536 x 2048
    Figure(65536, 65536, 2048, "float32", "forward", "predicted", 31000),
    Figure(65536, 65536, 2048, "float32", "backward", "predicted", 2600),
    Figure(65536, 65536, 2048, "float32", "forward", "goal", 25600),
    Figure(65536, 65536, 2048, "float32", "forward", "later", 16800),
    Figure(65536, 65536, 2048, "float32", "forward", "floor", 13000),
    Figure(65536, 65536, 2048, "float32", "forward", "predicted", 23500, kernel="scores"),
    Figure(65536, 65536, 2048, "float32", "forward", "predicted", 3500, kernel="samples"),
    Figure(65536, 65536, 2048, "float32", "forward", "predicted", 2500, kernel="refine"),
    # a bank of 65536 x 2048
    Figure(256, 65536, 2048, "float32", "both", "predicted", 340, bank=True),
    Figure(256, 65536, 2048, "float32", "both", "goal", 195, bank=True),
    Figure(256, 65536, 2048, "float32", "both", "later", 167, bank=True),
    Figure(256, 65536, 2048, "float32", "both", "floor", 125, bank=True, note="reading the bank once"),
    Figure(256, 65536, 2048, "float32", "forward", "predicted", 185, bank=True, kernel="bank"),
    Figure(256, 65536, 2048, "float32", "forward", "later", 140, bank=True, kernel="bank"),
    Figure(64, 65536, 2048, "float32", "both", "predicted", 900, bank=True, path="dense"),
    Figure(64, 65536, 2048, "float32", "both", "goal", 180, bank=True),
    Figure(64, 65536, 2048, "float32", "both", "floor", 125, bank=True, note="reading the bank once"),
    # anchors among candidates gathered from all processes
    Figure(512, 8192, 2048, "float32", "both", "predicted", 230, path="dense"),
    Figure(512, 8192, 2048, "float32", "both", "goal", 110),
    Figure(512, 8192, 2048, "float32", "both", "floor", 65),
)


def figures(N: int, M: int, D: int, dtype: str, bank: bool) -> list[Figure]:
    """All that is stated for a problem, kernels included, in the order of FIGURES."""
    return [each for each in FIGURES if (each.N, each.M, each.D, each.dtype, each.bank) == (N, M, D, dtype, bank)]


def stated_us(
    N: int, M: int, D: int, dtype: str, bank: bool, scope: str, path: str, source: Source, how: str = "graph"
) -> float | None:
    """The time of one source for a whole forward or forward and backward; `path` "auto" or "" is the planner's.

    What is stated for no path in particular is stated for the planner's choice, not for a path that is forced. Where
    forward and backward are stated each alone, "both" is their sum.
    """
    wanted = "" if path == "auto" else path
    found: dict[str, float] = {
        each.scope: each.us
        for each in figures(N, M, D, dtype, bank)
        if (each.kernel, each.source, each.how, each.path) == ("", source, how, wanted)
    }
    if scope == "both" and "both" not in found and {"forward", "backward"} <= found.keys():
        return found["forward"] + found["backward"]
    return found.get(scope)


def expected_us(
    N: int, M: int, D: int, dtype: str, bank: bool, scope: str, path: str, how: str = "graph"
) -> float | None:
    """What a measured time is to be held against: the goal, else the prediction; None where neither is stated.

    `scope` is "forward" or "both", `path` what was asked for ("auto": the planner's choice), `how` "graph" or "called".
    """
    sources: tuple[Source, ...] = ("goal", "predicted")
    for source in sources:
        if (found := stated_us(N, M, D, dtype, bank, scope, path, source, how)) is not None:
            return found
    return None
