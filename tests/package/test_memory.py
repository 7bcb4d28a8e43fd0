"""Peak memory of a forward and backward, each in a process of its own."""

from __future__ import annotations

import json

import pytest

from support import fresh_python

# Runs in the fresh process. Prints how many bytes the peak of resident memory grows in the forward (less the support
# graph that it keeps) and in the backward (less the gradients). Each is measured alone: where gradients are kept from
# step to step, the forward's memory comes on top of them. The peak counter is reset first (Linux: 5 to clear_refs);
# where that is not allowed, an earlier peak can only make the measurement too large.
SCRIPT = """
import json, sys, torch, sn_ops
rows, bank, dims, k, dtype, backend, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def make(n):
    # In place and in small pieces: no temporary raises the peak before the measurement.
    x = torch.empty(n, dims, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(n)
    for part in x.split(256):
        part.copy_(torch.randn(part.shape, generator=generator) / dims**0.5)
    return x

feats, labels = make(rows).requires_grad_(), torch.arange(rows) // 4
more = {}
if bank:
    more = {"candidates": make(bank).requires_grad_(), "candidate_labels": torch.arange(bank) // 4}
tiny = torch.randn(80, 8).requires_grad_()
for _ in range(2):  # loads code, starts threads
    sn_ops.sn_loss(tiny, torch.arange(80) // 4, k=k, backend=backend).backward()

def growth(call):
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    before = status("VmRSS")
    result = call()
    return status("VmHWM") - before, result

forward, loss = growth(lambda: sn_ops.sn_loss(feats, labels, k=k, backend=backend, **more))
acc = 8 if dtype == "float64" else 4
forward -= rows * (min(k, bank or rows) + 2) * (4 + acc)
backward, _ = growth(loss.backward)
backward -= sum(x.grad.nbytes for x in (feats, more.get("candidates")) if x is not None)
print(json.dumps([forward, backward]))
"""

# Memory of the measurement itself: code pages touched for the first time, allocator caches, Python objects.
NOISE = 2 * 2**20


def excess(rows: int, bank: int, dims: int, k: int, dtype: str, backend: str, threads: int) -> tuple[int, int]:
    """Bytes of the forward and of the backward beyond inputs, gradients and support graph."""
    arguments = json.dumps([rows, bank, dims, k, dtype, backend, threads])
    done = fresh_python.run("-c", SCRIPT, arguments, patience=600)
    assert done.returncode == 0, done.stderr
    forward, backward = json.loads(done.stdout)
    return forward, backward


@pytest.mark.parametrize(
    ("rows", "bank", "dims", "k", "dtype", "threads"),
    [
        (64, 0, 2048, 10, "float32", 2),
        (1024, 0, 2048, 10, "float32", 2),
        (4096, 0, 512, 10, "float32", 1),
        (4096, 0, 512, 10, "float32", 2),
        (4096, 0, 512, 10, "bfloat16", 2),
        (2048, 0, 256, 10, "float64", 2),
        (8192, 0, 128, 10, "float32", 2),
        (16384, 0, 64, 128, "float32", 2),
        (16384, 0, 64, 10, "float32", 2),
        (256, 32768, 128, 10, "float32", 2),
        (16384, 512, 128, 10, "float32", 2),
    ],
)
def test_peak(rows: int, bank: int, dims: int, k: int, dtype: str, threads: int) -> None:
    """8 MB + 2 (N + M) D bytes + 1 KB a row; a row is an anchor, or a candidate that is none."""
    candidates = bank or rows
    budget = 8 * 2**20 + 2 * (rows + candidates) * dims + 1024 * (rows + bank)
    for name, used in zip(("forward", "backward"), excess(rows, bank, dims, k, dtype, "cpu", threads), strict=True):
        assert used <= budget + NOISE, f"{name}: {used / 2**20:.1f} MB > {budget / 2**20:.1f} MB"


def test_the_measurement_sees_memory() -> None:
    """The dense reference holds at least one N x M matrix: a measurement that misses it measures nothing."""
    assert excess(2048, 0, 16, 10, "float32", "reference", 1)[0] > 2048 * 2048 * 4
