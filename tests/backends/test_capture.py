"""What a CUDA graph asks of a call: no value read on the host, launches that depend on shapes alone, memory from
PyTorch's allocator. Shown without a GPU; `test_cuda.py` captures and replays.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sn_ops
from sn_ops import ops
from support import problems, simt
from support.backends import require

ROOT = Path(__file__).resolve().parents[2]

# Calls of CUDA's runtime that a capture refuses, or that take memory past PyTorch.
FORBIDDEN = re.compile(
    r"cuda(Malloc|Free|HostAlloc|Memcpy|Memset|DeviceSynchronize|StreamSynchronize|EventSynchronize|EventQuery|StreamQuery)"
)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["self", "none", "offset", "tensor"])
def test_no_value_is_read(fused_backend: str, kind: str, reduction: str) -> None:
    """Forward and backward of tensors without values: who read one would be refused."""
    case = problems.self_case(24, 16, 6) if kind == "self" else problems.bank_case(12, 30, 16, 5, k=3, self_kind=kind)
    case = case.on(fused_backend)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake: dict[str, Any] = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in case.arguments().items()
        }
        inputs = [fake[name].requires_grad_() for name in ("feats", "candidates") if fake.get(name) is not None]
        loss, stats = sn_ops.sn_loss(**fake, reduction=reduction, backend=fused_backend, return_stats=True)
        grads = torch.autograd.grad(loss, inputs, torch.ones_like(loss))
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]
    # A tensor on another device would take the call out of what "reduce-overhead" captures.
    assert {x.device for x in (loss, *stats, *grads)} == {case.feats.device}


@pytest.mark.parametrize("rows", [5, 48, 128, 200])
def test_launches_depend_on_shapes_alone(rows: int) -> None:
    """The CUDA kernels: batches of one shape and very different values take the same path, launches and workspace."""
    require("simt")
    generator = torch.Generator().manual_seed(rows)
    spread = torch.nn.functional.normalize(torch.randn(rows, 40, generator=generator), dim=1)
    labels = torch.arange(rows) // 4
    batches = {
        "random": (spread, labels),
        "equal rows": (spread[:1].expand(rows, 40).contiguous(), labels),
        "NaN": (spread.where(torch.arange(rows)[:, None] != 3, torch.nan), labels),
        "one identity": (spread, labels * 0),
        "nobody alike": (spread, torch.arange(rows)),
        "huge": (spread * 1e30, labels),
    }
    seen = {}
    for name, (feats, identities) in batches.items():
        leaf = feats.clone().requires_grad_()
        loss = sn_ops.sn_loss(leaf, identities, backend="simt")
        forward = simt.last_report
        loss.backward()
        backward = simt.last_report
        assert forward is not None and backward is not None
        seen[name] = [(x.path, x.launches, x.workspace_bytes) for x in (forward, backward)]
    assert len({str(facts) for facts in seen.values()}) == 1, seen


def test_all_memory_is_the_frameworks() -> None:
    """No source of the CUDA backend allocates, copies or waits."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")]
    assert len(sources) > 50
    found = [
        f"{path.name}: {line}" for path in sources for line in path.read_text().splitlines() if FORBIDDEN.search(line)
    ]
    assert not found, found
    assert FORBIDDEN.search("STD_CUDA_CHECK(cudaMemsetAsync(p, 0, 4, stream));")


def test_operators_may_be_captured(fused_backend: str) -> None:
    """ "reduce-overhead" leaves out operators with this tag."""
    operators: Any = ops.OPERATORS[fused_backend]
    for operator in operators[:4]:
        assert torch.Tag.cudagraph_unsafe not in operator.tags, operator


def test_reduce_overhead() -> None:
    """A training step compiled in that mode gives the eager losses, step by step."""
    case = problems.self_case(48, 20, 8)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Linear(20, 12)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)

        def loss_of(x: Tensor, y: Tensor, network: torch.nn.Module = network) -> Tensor:
            return sn_ops.sn_loss(torch.nn.functional.normalize(network(x), dim=1), y, k=4, alpha=5.0)

        call = torch.compile(loss_of, mode="reduce-overhead", fullgraph=True) if compiled else loss_of
        steps = []
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            loss = call(case.feats, case.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0][0] > losses[0][-1]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
