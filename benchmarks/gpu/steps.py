"""The table of the kit's steps: what runs on a GPU, in which order, and for how long at most.

A call is one command on the GPU's machine, `prove.py` or `measure.py`. Its steps run in the order of the table, each a
process of its own; a step with `beside` runs at the same time as the step it names.

A step's program also runs by hand: `PYTHONPATH=benchmarks/gpu python benchmarks/gpu/programs/smoke.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

CALL_LIMIT_S = {"prove": 420.0, "measure": 385.0}
"""Call -> seconds it may take in all. Two calls and the start of a machine fit into fifteen minutes."""

OVERHEAD_S = 20.0
"""What the runner may add to the caps of a call: starting processes, writing the record, ending what hangs."""


@dataclass(frozen=True)
class Step:
    """One step of a call.

    `program` is a file of the folder `programs` with its arguments. `cap` is in seconds: a process that takes longer is
    ended, with all that it started. Where a `gate` does not pass, the steps after it are not run: what they would show
    is not worth the time. `anyway` marks those that still are. Steps marked `always` run whatever is picked.
    """

    name: str
    call: str
    cap: float
    program: tuple[str, ...]
    what: str
    beside: str | None = None
    gate: bool = False
    anyway: bool = False
    always: bool = False
    environment: tuple[tuple[str, str], ...] = ()


STEPS = (
    Step("facts", "prove", 40, ("facts.py",), "device, driver, versions; the libraries load", gate=True, always=True),
    Step(
        "smoke",
        "prove",
        75,
        ("smoke.py",),
        "every path, backward and dtype in a process of its own: bits against direct, values against cpu",
        gate=True,
        environment=(("CUDA_LAUNCH_BLOCKING", "1"), ("OMP_NUM_THREADS", "2")),
    ),
    Step("probe", "prove", 15, ("probe.py",), "what one mma loses of a sum, against the bound", anyway=True),
    Step(
        "tests",
        "prove",
        150,
        ("suite.py",),
        "the suite's tests of the cuda backend",
        environment=(("OMP_NUM_THREADS", "2"),),
    ),
    Step(
        "sanitizers",
        "prove",
        130,
        ("sanitizers.py",),
        "memcheck and racecheck on every path",
        beside="tests",
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"), ("OMP_NUM_THREADS", "2")),
    ),
    Step("replay", "prove", 50, ("replay.py",), "CUDA graphs replayed beside a busy stream: bits compared each time"),
    Step(
        "tests-triton",
        "prove",
        60,
        ("suite.py", "triton"),
        "the suite's worked examples and selections by the Triton backend, compiled here",
        anyway=True,
        environment=(("OMP_NUM_THREADS", "2"),),
    ),
    Step("facts", "measure", 30, ("facts.py",), "device, driver, versions; the libraries load", gate=True, always=True),
    Step("ceilings", "measure", 25, ("ceilings.py",), "launches, copies, caches and matrix products of the device"),
    Step("loss", "measure", 45, ("times.py", "loss"), "the loss in a CUDA graph and as called from Python"),
    Step("paths", "measure", 35, ("times.py", "paths"), "every path that serves a shape, side by side"),
    Step("kernels", "measure", 25, ("times.py", "kernels"), "microseconds of every kernel"),
    Step("rivals", "measure", 25, ("times.py", "rivals"), "plain PyTorch on the same inputs"),
    Step("train", "measure", 30, ("train.py",), "the share of the loss in a training step of ResNet50"),
    Step("triton", "measure", 50, ("times.py", "triton"), "the Triton backend; compiling is not counted"),
    Step("counters", "measure", 60, ("counters.py",), "Nsight Compute's counters of the kernels at three shapes"),
    Step("compile", "measure", 40, ("times.py", "compile"), "torch.compile of plain PyTorch; compiling is not counted"),
)


def steps_of(call: str) -> list[Step]:
    """The steps of a call, in their order."""
    return [step for step in STEPS if step.call == call]


def groups_of(steps: list[Step]) -> list[list[Step]]:
    """Steps that run at the same time, in order: a step and those beside it."""
    names = {step.name for step in steps}
    leaders = [step for step in steps if step.beside is None or step.beside not in names]
    return [[leader, *(s for s in steps if s.beside == leader.name)] for leader in leaders]


def longest(steps: list[Step]) -> float:
    """Seconds that the steps take if each uses up its cap."""
    return sum(max(step.cap for step in group) for group in groups_of(steps))
