"""How the Triton backend launches its compiled kernels: how many, from what memory, and what a CUDA graph's capture may
find. In processes without the interpreter, where a driver that does nothing takes the launches of CPU tensors
(`benchmarks/bench_triton_host.py`). Compiling needs no GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support import fresh_python

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_triton_host.py"

PRETEND = f"""
import runpy, torch
from torch.utils._python_dispatch import TorchDispatchMode

host = runpy.run_path({str(SCRIPT)!r})
host["pretend"]()
driver, operators_of, launched = host["IdleDriver"], host["operators_of"], host["launched"]

class Noted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {{}}))

def allocations(call):
    with Noted() as noted:
        call()
    assert set(noted.names) == {{"aten::empty.memory_format"}}, noted.names  # others would be launches of their own
    return len(noted.names)

def refused(call):
    try:
        call()
    except RuntimeError as error:
        assert "run forward and backward once before the capture" in str(error), error
        return True
    return False
"""


def run(code: str) -> None:
    done = fresh_python.run("-c", PRETEND + code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rows", [33, 128])
def test_small_batches_take_four_launches(rows: int) -> None:
    """Three forward and one backward, and nothing of PyTorch but memory: the results' and one workspace each.

    Of the training operators and of the two that any backend's graph goes through."""
    run(f"""
forward, backward = operators_of({rows}, 256, 10)
backward()
assert launched(forward) == ["search_kernel", "loss_kernel", "reduce_kernel"], launched(forward)
assert launched(backward) == ["gradient_kernel"], launched(backward)
from sn_ops.triton import operators
feats, labels, one = torch.zeros({rows}, 256), torch.arange({rows}) // 4, torch.ones(())
_, buffer, stats = operators.loss(feats, labels, None, None, None, 0, 10, 50.0, 0.1, 0, 0)
train = lambda: operators.loss(feats, labels, None, None, None, 0, 10, 50.0, 0.1, 0, 0)
train_back = lambda: operators.loss_backward(one, feats, None, buffer, stats, 10, 0, True, False)
assert allocations(train) == 3 + 1, allocations(train)
assert allocations(train_back) == 1 + 1, allocations(train_back)
graph = operators.forward(feats, labels, None, None, None, 0, 10, 50.0, 0.1, 0, 0, False)
again = lambda: operators.forward(feats, labels, None, None, None, 0, 10, 50.0, 0.1, 0, 0, False)
back = lambda: operators.backward(graph[0], feats, None, graph[1], graph[2], graph[6], 0, True, False)
assert allocations(again) == 7 + 1, allocations(again)
assert allocations(back) == 2 + 1, allocations(back)
""")


def test_a_capture_needs_warm_kernels() -> None:
    """Compiling and loading break a capture: a cold variant is refused before Triton tries, and warm ones run."""
    run("""
capturing = False
torch.cuda.is_initialized = lambda: True
torch.cuda.is_current_stream_capturing = lambda: capturing
forward, backward = operators_of(40, 64, 5)
capturing = True
forward()  # warm by now
loaded = len(driver.loads)
assert refused(backward) and len(driver.loads) == loaded, "a cold backward"
capturing = False
backward()
capturing = True
backward()
assert refused(lambda: operators_of(40, 65, 5)), "another D"
assert refused(lambda: operators_of(40, 64, 20)), "another length of lists"
assert refused(lambda: operators_of(40, 64, 5, torch.float16)), "another type"
operators_of(39, 64, 6)[1]()  # numbers that are no part of the code
""")


def test_an_upstream_gradient_may_lie_anywhere() -> None:
    """Its address, or that of a label, chooses no variant: what ran once runs in every capture."""
    run("""
from sn_ops.triton import operators
forward, backward = operators_of(40, 64, 5)
backward()
value, graph, stats = forward()
feats, loads = torch.zeros(40, 64), len(driver.loads)
for offset in range(1, 4):
    upstream = torch.ones(8)[offset]
    assert upstream.data_ptr() % 16
    operators.loss_backward(upstream, feats, None, graph, stats, 5, 0, True, False)
    labels = torch.zeros(48, dtype=torch.int64)[1 + offset:][:40]
    operators.loss(feats, labels, None, None, None, 0, 5, 50.0, 0.1, 0, 0)
assert len(driver.loads) == loads, driver.loads[loads:]
""")


def test_every_part_of_a_workspace_lies_in_its_memory() -> None:
    """Empty parts too: the driver is asked whose memory an address is. Each starts at a multiple of 64 bytes."""
    run("""
from sn_ops.triton.launch import workspace
parts = ((torch.int64, (0,)), (torch.float64, (3, 5)), (torch.int32, (7,)), (torch.int32, (0, 8)))
*found, memory = workspace(torch.device("cpu"), *parts)
offsets = [part.data_ptr() - memory.data_ptr() for part in found]
assert offsets == [0, 64, 192, 256] and memory.numel() == 320, offsets
assert [part.dtype for part in found] == [dtype for dtype, _ in parts]
""")


def test_the_key_of_a_variant_says_what_triton_specialises() -> None:
    """What is looked up is what Triton would have chosen, over batches that differ in one fact each."""
    run("""
from sn_ops.triton import launch, operators
from triton.runtime.jit import JITFunction

chosen = []

class Table(dict):
    def get(self, key):
        chosen.append(super().get(key))
        return chosen[-1]

table = launch._COMPILED = Table()
triton_chooses = JITFunction.run

def note(self, *arguments, **options):
    chosen.append(triton_chooses(self, *arguments, **options))
    return chosen[-1]

def both_ways(call):
    call()
    chosen.clear()
    call()
    ours = list(chosen)
    chosen.clear()
    JITFunction.run, launch._COMPILED = note, {}
    call()
    JITFunction.run, launch._COMPILED = triton_chooses, table  # which keeps what the batches before have left in it
    return ours, list(chosen)

def check(n=40, d=64, k=5, dtype=torch.float32, offset=0, apart=0, bank=0, self_offset=0, reduction=0):
    memory = torch.zeros((n + 1) * (d + apart) + 64, dtype=dtype)[offset:]
    feats, labels = memory.as_strided((n, d), (d + apart, 1)), torch.arange(n) // 4
    candidates = torch.zeros(bank, d, dtype=dtype) if bank else None
    theirs = torch.zeros(bank, dtype=torch.int64) if bank else None

    def call():
        value, indices, coefficients, *_, stats = operators.forward(
            feats, labels, candidates, theirs, None, self_offset, k, 50.0, 0.1, 0, reduction, False)
        operators.backward(
            torch.ones_like(value), feats, candidates, indices, coefficients, stats, reduction, True, bank > 0)

    ours, its = both_ways(call)
    assert len(ours) >= 4 and all(a is b for a, b in zip(ours, its, strict=True)), locals()

check()
for change in (dict(d=65), dict(d=1), dict(offset=1), dict(apart=1), dict(n=41), dict(n=1, d=16), dict(k=200, n=210),
               dict(dtype=torch.bfloat16, d=33), dict(bank=70, self_offset=16), dict(bank=1, k=1), dict(reduction=2),
               dict(n=20, d=33, apart=31, bank=1100), dict(apart=16), dict(d=65, apart=15)):
    check(**change)

def check_backward(n, m=60000, d=16, edges=7):
    feats, bank, stats = torch.zeros(n, d), torch.zeros(m, d), torch.ones(6, dtype=torch.float64)
    indices = torch.arange(n * edges, dtype=torch.int32).reshape(n, edges)
    for bank_too in (True, False):
        ours, its = both_ways(lambda: operators.backward(
            torch.ones(()), feats, bank, indices, torch.ones(n, edges), stats, 0, True, bank_too))
        assert len(ours) >= 1 and all(a is b for a, b in zip(ours, its, strict=True)), (n, ours, its)

for n in (11, 64):  # too few edges for a chunk, and some
    check_backward(n)
""")
