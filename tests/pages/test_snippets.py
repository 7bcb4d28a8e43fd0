"""What README.md, CONTRIBUTING.md and docs/ show runs as it stands there.

Every Python block has a name, `<!-- snippet:NAME -->`, and is run. Every shell block is checked command by command; one
that is marked `<!-- run -->` is run too, `<!-- ci:test -->` is run by CI, and the others say why not:
`<!-- not run: REASON -->`.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sn_ops import reid
from sn_ops.reid.requirements import need
from support import shell
from support.pages import PAGES, Block, all_blocks, name_of, prose
from support.tiny_runs import one_thread, tiny_config, write_market

PYTHON = all_blocks("python")
SNIPPETS = {
    block.marker.removeprefix("snippet:"): block.text for block in PYTHON if block.marker.startswith("snippet:")
}
SHELL = all_blocks("bash")
NOT_RUN = [block for block in SHELL if block.marker.startswith("not run: ")]

# Each of them leaves something behind that is looked at.
IN_THIS_PROCESS = (
    "backends",
    "bank",
    "compile",
    "graph",
    "index",
    "lightning",
    "loop",
    "pml",
    "pml-memory",
    "reduce-overhead",
    "stats",
    "support",
    "use",
)  # fmt: skip
TRAINS = ("reid",)
UNDER_TORCHRUN = ("distributed",)
# What a snippet needs that the package does not bring.
NEEDS = {"lightning": "lightning", "pml": "pytorch_metric_learning", "pml-memory": "pytorch_metric_learning"}


def place(block: Block) -> str:
    return f"{block.page}:{block.line}"


def test_every_snippet_is_known() -> None:
    """A new one needs a name on its page and a test here."""
    assert not [place(block) for block in PYTHON if not block.marker.startswith("snippet:")]
    assert sorted(SNIPPETS) == sorted(IN_THIS_PROCESS + TRAINS + UNDER_TORCHRUN)
    assert len(SNIPPETS) == len(PYTHON), "two snippets of one name"
    markers = sum(page.read_text(encoding="utf-8").count("<!-- snippet:") for page in PAGES)
    assert markers == len(PYTHON), "a marker whose block is not Python"


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
@pytest.mark.filterwarnings("ignore")  # of the libraries that snippets use
def test_runs(name: str) -> None:
    if package := NEEDS.get(name):
        with contextlib.suppress(ImportError):
            need("torchvision")  # Lightning imports it where it is, and beside a CPU build of PyTorch that takes help
        pytest.importorskip(package)
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": f"page_{name.replace('-', '_')}"}
    exec(compile(SNIPPETS[name], f"snippet:{name}", "exec"), space)
    if name == "lightning":
        loss = space["trainer"].callback_metrics["loss"]
    elif name == "pml":
        loss = space["loss_func"](space["trunk"](space["data"].tensors[0]), space["identities"])
    else:
        loss = space["loss"]
    assert isinstance(loss, Tensor) and bool(loss.isfinite()) and float(loss) > 0
    if name == "bank":
        assert space["bank"].shape[0] == 65_536 and space["stored"] == 20 * 96
        assert space["bank"][: space["stored"]].norm(dim=1).allclose(torch.ones(space["stored"]))
    if name == "backends":
        assert bool(space["second"].isfinite().all()) and bool(space["second"].any())
    if name in ("stats", "use"):
        assert space["stats"].valid_anchors == 128
    if name in ("support", "use"):
        assert space["s"].indices.shape == (128, 10)


@pytest.mark.parametrize("name", TRAINS)
def test_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but for the preset: one that takes a second."""
    pytest.importorskip("torchvision")
    tiny = tiny_config(write_market(tmp_path / "market"), tmp_path / "run")
    monkeypatch.setattr(reid, "preset", {"quick": tiny}.__getitem__, raising=False)
    space: dict[str, Any] = {"__name__": f"page_{name}"}
    with one_thread():
        exec(compile(SNIPPETS[name], f"snippet:{name}", "exec"), space)
    assert (space["run"] / "report.html").is_file()
    assert 0 < next(iter(space["scores"].values())).mAP <= 1


@pytest.mark.parametrize("name", UNDER_TORCHRUN)
def test_runs_on_two_processes(name: str, tmp_path: Path) -> None:
    """As it stands, but for how the processes end.

    DistributedDataParallel keeps gloo's threads alive beyond destroy_process_group(). When one of them gets round to
    releasing the last collective (its thread-local state holds a Python object) while Python shuts down, Python before
    3.14 ends the thread inside a destructor, and the process aborts: "terminate called without an active exception".
    What the snippet shows is over by then, so a process leaves without a shutdown.
    """
    script = tmp_path / "train.py"
    leave = "\nimport os, sys\n\nsys.stdout.flush()\nos._exit(0)\n"
    script.write_text(SNIPPETS[name] + leave, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss \d+\.\d+\n", done.stdout), done.stdout


# ---- shell ------------------------------------------------------------------------------------------------------


def test_every_shell_block_is_run_or_says_why_not() -> None:
    silent = [place(b) for b in SHELL if b.marker not in ("run", "ci:test") and b not in NOT_RUN]
    assert not silent
    markers = sum(page.read_text(encoding="utf-8").count("<!-- not run: ") for page in PAGES)
    assert markers == len(NOT_RUN), "a marker whose block is not of a shell"


def test_how_many_are_not_run() -> None:
    """One more is a decision: its page is named here."""
    counts = Counter(block.page for block in NOT_RUN)
    assert counts == {
        "CONTRIBUTING.md": 1,
        "README.md": 2,
        "docs/backends.md": 1,
        "docs/distributed.md": 1,
        "docs/performance.md": 1,
        "docs/reid.md": 5,
    }


@pytest.mark.parametrize("block", SHELL, ids=place)
def test_commands_exist_and_take_their_arguments(block: Block) -> None:
    found = list(shell.commands(block.text))
    assert found
    assert not [f"{' '.join(words)}: {what}" for words in found if (what := shell.problem(words))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_prose(page: Path) -> None:
    """`python ...`, `pip install ...` and the like between backquotes."""
    inline = re.findall(r"`((?:python|pip|torchrun|pytest|mkdocs|sn-reid) [^`\n]*)`", prose(page))
    found = [words for text in inline for words in shell.commands(text)]
    assert not [f"{' '.join(words)}: {what}" for words in found if (what := shell.problem(words))]


@pytest.mark.parametrize("block", [block for block in SHELL if block.marker == "run"], ids=place)
def test_shell_block_runs(block: Block, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-e", "-c", block.text], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python benchmarks/bench_loss.py --quik", "has no --quik"),
        ("python benchmarks/bench_los.py", "no benchmarks/bench_los.py here"),
        ("python -m sn_ops.reid trian", "invalid choice"),
        ("python -m sn_ops.reid train --set loss.kk=3", "loss.kk"),
        ("python -m sn_opss", "no module sn_opss"),
        ("pip install '.[tset]'", "no extra tset"),
        ("torchrun --nproc-per-node 2 -m sn_ops.reid trian", "invalid choice"),
        ("torchrun --processes 2 -m sn_ops.reid train", "unrecognized arguments: --processes"),
        ("pytest tests/nowhere", "no tests/nowhere here"),
        (".ci/ran", "no .ci/ran here"),
        ("frobnicate", "frobnicate is unknown"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, said: str) -> None:
    (words,) = shell.commands(f"FLAG=1 {command}  # a comment")
    assert said in shell.problem(words)
