"""What README.md shows runs as it stands there."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sn_ops.reid.requirements import need

README = Path(__file__).resolve().parents[2] / "README.md"
MARKER = re.compile(r"^<!-- snippet:([\w-]+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = dict(MARKER.findall(README.read_text(encoding="utf-8")))

# What each of them leaves behind to be looked at.
IN_THIS_PROCESS = ("loop", "lightning", "bank", "pml", "pml-memory")
UNDER_TORCHRUN = ("distributed",)
# What a snippet needs that the package does not bring.
NEEDS = {"lightning": "lightning", "pml": "pytorch_metric_learning", "pml-memory": "pytorch_metric_learning"}


def test_every_snippet_is_known() -> None:
    """A new one in the README needs a test here; a marker whose block is not Python is none."""
    assert sorted(SNIPPETS) == sorted(IN_THIS_PROCESS + UNDER_TORCHRUN)
    assert README.read_text(encoding="utf-8").count("<!-- snippet:") == len(SNIPPETS)


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
@pytest.mark.filterwarnings("ignore")  # of the libraries that snippets use
def test_runs(name: str) -> None:
    if package := NEEDS.get(name):
        with contextlib.suppress(ImportError):
            need("torchvision")  # Lightning imports it where it is, and beside a CPU build of PyTorch that takes help
        pytest.importorskip(package)
    torch.manual_seed(0)
    space: dict[str, Any] = {"__name__": f"readme_{name.replace('-', '_')}"}
    exec(compile(SNIPPETS[name], f"README.md:{name}", "exec"), space)
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


@pytest.mark.parametrize("name", UNDER_TORCHRUN)
def test_runs_on_two_processes(name: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SNIPPETS[name], encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss \d+\.\d+\n", done.stdout), done.stdout
