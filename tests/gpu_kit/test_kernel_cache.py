"""The cache of Triton kernels that travels, and how the kit tells what was compiled all the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fill
import kernel_cache
import runner
import sn_ops
from steps import Step
from support import fresh_python
from support.backends import require

# Launches a kernel on a GPU that is not there, and says what that compiled.
LAUNCH = """
import sys
sys.path.insert(0, {kit!r})
import fill, kernel_cache
from pathlib import Path
import torch
kernel_cache.listen()
call = ["forward", [*map(fill.described, (torch.empty(8, {dims}), torch.empty(8, dtype=torch.int64))), None, None, None,
        0, 2, 50.0, 0.1, 0, 0, False]]
fill.launch([call], 90)
print(kernel_cache.told(kernel_cache.report(Path({events!r}))))
"""


def launch(folder: Path, cache: Path, dims: int = 16) -> str:
    """In a process of its own, as Triton reads TRITON_INTERPRET when it is imported."""
    events = folder / f"events-{len(list(folder.iterdir()))}"
    code = LAUNCH.format(kit=str(Path(fill.__file__).parent), dims=dims, events=str(events))
    environment: dict[str, Any] = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        kernel_cache.EVENTS: str(events),
    }
    done = fresh_python.run("-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_cache_that_moved_is_found(tmp_path: Path) -> None:
    """In a folder elsewhere, the one that it was made in gone: all kernels are found, but not those of another call."""
    made, archive, elsewhere = tmp_path / "made", tmp_path / "a" / "triton.tar.gz", tmp_path / "else" / "where"
    assert " compiled in " in launch(tmp_path, made)
    (tmp_path / "calls").write_text("[]")
    entries = kernel_cache.pack(made, tmp_path / "calls", archive)
    shutil.rmtree(made)
    kernel_cache.unpack(archive, elsewhere)
    assert entries > 2
    said = launch(tmp_path, elsewhere)
    assert said.endswith("kernels from the cache, none compiled") and not said.startswith("0 "), said
    assert " compiled in " in launch(tmp_path, elsewhere, dims=4096)


@pytest.mark.parametrize("rows", [torch.empty(6, 5), torch.empty(6, 8)[:, 1:6], torch.empty(5, 6).T, torch.empty(0, 5)])
def test_a_described_tensor_is_made_again(rows: torch.Tensor) -> None:
    again = fill.argument_of(json.loads(json.dumps(fill.described(rows))))
    assert (again.shape, again.stride(), again.dtype) == (rows.shape, rows.stride(), rows.dtype)
    assert again.data_ptr() % 16 == rows.storage_offset() * 4 % 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about Triton's interpreter")
def test_calls_are_noted_once() -> None:
    """Forward and backward with the arguments that the operators get; without values they are not run."""
    require("triton")
    feats = torch.randn(6, 5, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    with fill.Noting(values=False) as noting:
        for _ in range(2):
            loss = sn_ops.sn_loss(feats, labels, k=3, backend="triton")
            assert loss == 0
            (gradient,) = torch.autograd.grad(loss, feats)
    assert gradient.shape == feats.shape
    names = [json.loads(call)[0] for call in noting.calls]
    assert names == ["loss", "loss_backward"]
    assert json.loads(next(iter(noting.calls)))[1][0] == ["float32", [6, 5], [5, 1], 0]
    with fill.Noting(values=True) as noting:
        assert sn_ops.sn_loss(feats, labels, k=3, backend="triton") != 0


def event(kernel: str, hit: bool) -> None:
    kernel_cache.note(kernel, "KP=16", hit, 0.5)


def test_what_was_compiled_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = tmp_path / "events"
    monkeypatch.setenv(kernel_cache.EVENTS, str(events))
    monkeypatch.setattr(kernel_cache, "ARCHIVE", tmp_path / "none")
    for kernel, hit in (("a", True), ("b", True), ("c", False), ("c", False)):
        event(kernel, hit)
    with events.open("a") as file:
        file.write('{"kernel": "cut o')
    said = {"prepared": False, "hits": 2, "misses": 2, "seconds": 1.0, "missed": ["c KP=16"]}
    assert kernel_cache.report(events) == said
    assert kernel_cache.tell() == "2 kernels compiled in 1 s, 2 from the cache"
    printed = capsys.readouterr().out
    assert "compiled: c KP=16" in printed and '"misses": 2' in printed
    assert kernel_cache.report(tmp_path / "never")["hits"] == 0


def test_each_step_has_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What travelled is copied and not written to; a cache that the user names is left to him."""
    entry = tmp_path / "made" / "ENTRY"
    entry.mkdir(parents=True)
    (entry / "a_kernel.json").write_text("{}")
    (entry / "a_kernel.cubin").write_text("code")
    (entry / "a_kernel.ptx").write_text("not needed")
    (tmp_path / "calls").write_text("[]")
    archive = tmp_path / "triton.tar.gz"
    assert kernel_cache.pack(tmp_path / "made", tmp_path / "calls", archive) == 1
    monkeypatch.setattr(kernel_cache, "ARCHIVE", archive)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    call = runner.Runner("prove", [], 60, tmp_path / "out", pretend=True, command=[])
    folders = []
    for name in ("one", "two"):
        environment = call.environment(Step(name, "prove", 60, (), ""))
        folders.append(Path(environment["TRITON_CACHE_DIR"]))
        assert environment[kernel_cache.EVENTS].startswith(str(folders[-1].parent))
    assert folders[0] != folders[1]
    files = {path.name for path in (folders[1] / "ENTRY").iterdir()}
    assert files == {"a_kernel.json", "a_kernel.cubin", "__grp__a_kernel.json"}
    listed = json.loads((folders[1] / "ENTRY" / "__grp__a_kernel.json").read_text())["child_paths"]
    assert listed == {name: str(folders[1] / "ENTRY" / name) for name in ("a_kernel.json", "a_kernel.cubin")}
    monkeypatch.setenv("TRITON_CACHE_DIR", "/of/the/user")
    assert call.environment(Step("three", "prove", 60, (), ""))["TRITON_CACHE_DIR"] == "/of/the/user"
    call.disk.close()
