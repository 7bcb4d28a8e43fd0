"""What only a GPU can show of the CUDA and Triton backends: streams, graphs, devices, memory, repetition.

The semantic suite runs there too, through the list of backends; tests/simt proves the kernels without a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sn_ops
from support import judge, problems
from support.backends import ON_GPU, forced, require_gpu
from support.cuda_paths import PATHS
from support.problems import Case


@pytest.fixture(scope="module", params=ON_GPU)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a GPU, if there is one."""
    return require_gpu(request.param)


def large_case(rows: int = 3000, dims: int = 256, k: int = 10, seed: int = 0) -> Case:
    return problems.self_case(rows, dims, rows // 4, k, seed=seed)


def everything(case: Case, backend: str, reduction: str = "mean") -> list[Tensor]:
    """Loss, statistics, gradients and neighbours."""
    leaves = case.leaves()
    loss, stats = sn_ops.sn_loss(**leaves.arguments(), reduction=reduction, backend=backend, return_stats=True)
    grads = torch.autograd.grad(loss, leaves.inputs(), torch.ones_like(loss))
    return [loss.detach(), *stats, *grads, *judge.neighbors_of(case, backend)]


@pytest.mark.parametrize("rows", [48, 300, 1500, 5000])
def test_repeats_bit_for_bit(gpu_backend: str, rows: int) -> None:
    """Also while another stream keeps the device busy."""
    case = large_case(rows).on(gpu_backend)
    first = everything(case, gpu_backend)
    busy = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device="cuda")
    for _ in range(5):
        with torch.cuda.stream(busy):
            for _ in range(4):
                noise @ noise
        judge.assert_same_bits(first, everything(case, gpu_backend))


@pytest.mark.parametrize("rows", [48, 300, 1500, 5000])
def test_no_synchronisation(gpu_backend: str, rows: int) -> None:
    """Neither forward nor backward waits for the device."""
    case = large_case(rows).on(gpu_backend).leaves()
    sn_ops.sn_loss(**case.arguments(), backend=gpu_backend).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sn_ops.sn_loss(**case.arguments(), backend=gpu_backend).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [48, 300, 1500, 5000])
def test_cuda_graph(gpu_backend: str, rows: int) -> None:
    """Captured once, replayed on new features: the bits of an eager call on them."""
    case = large_case(rows).on(gpu_backend)
    feats = case.feats.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            loss = sn_ops.sn_loss(feats, case.labels, backend=gpu_backend)
            torch.autograd.grad(loss, feats)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = sn_ops.sn_loss(feats, case.labels, backend=gpu_backend)
        (gradient,) = torch.autograd.grad(loss, feats)
    for seed in (1, 2):
        fresh = large_case(rows, seed=seed).on(gpu_backend).feats
        with torch.no_grad():
            feats.copy_(fresh)
        graph.replay()
        leaf = fresh.clone().requires_grad_()
        expected = sn_ops.sn_loss(leaf, case.labels, backend=gpu_backend)
        (expected_gradient,) = torch.autograd.grad(expected, leaf)
        judge.assert_same_bits([loss.detach(), gradient], [expected.detach(), expected_gradient])


@pytest.mark.parametrize("rows", [48, 128, 1500])
def test_cuda_graph_of_a_whole_step(gpu_backend: str, rows: int) -> None:
    """Network, loss, backward and optimiser in one graph, as docs/training-loops.md has it: an eager loop's steps."""
    batches = [large_case(rows, seed=seed).on(gpu_backend) for seed in range(6)]
    one = torch.ones((), device="cuda")
    losses = []
    for captured in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Linear(batches[0].feats.shape[1], 64, device="cuda")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        feats, labels = batches[0].feats.clone(), batches[0].labels.clone()

        def step(
            feats: torch.Tensor = feats,
            labels: torch.Tensor = labels,
            network: torch.nn.Module = network,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> torch.Tensor:
            optimizer.zero_grad()
            rows = torch.nn.functional.normalize(network(feats), dim=1)
            loss: torch.Tensor = sn_ops.sn_loss(rows, labels, backend=gpu_backend)
            loss.backward(one)
            optimizer.step()
            return loss

        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        loss = torch.zeros((), device="cuda")
        if captured:
            with torch.cuda.graph(graph):
                loss = step()
        found = []
        for batch in batches:
            feats.copy_(batch.feats)
            labels.copy_(batch.labels)
            if captured:
                graph.replay()
            else:
                loss = step()
            found.append(loss.detach().clone())
        losses.append(torch.stack(found))
    judge.assert_same_bits([losses[0]], [losses[1]])


def test_reduce_overhead_captures(gpu_backend: str) -> None:
    """`torch.compile(mode="reduce-overhead")` puts the loss into its graphs and leaves nothing out."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    case = large_case(128).on(gpu_backend)

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def loss_of(feats: torch.Tensor) -> torch.Tensor:
        return sn_ops.sn_loss(torch.nn.functional.normalize(feats, dim=1), case.labels, backend=gpu_backend)

    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        leaf = case.feats.clone().requires_grad_()
        loss = loss_of(leaf)
        loss.backward()
    assert counters["inductor"]["cudagraph_skips"] == 0
    expected = case.feats.clone().requires_grad_()
    wanted = sn_ops.sn_loss(torch.nn.functional.normalize(expected, dim=1), case.labels, backend=gpu_backend)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


def test_side_stream(gpu_backend: str) -> None:
    """Kernels run on the current stream: what they need was enqueued there a moment before."""
    case = large_case(2000).on(gpu_backend)
    expected = everything(case, gpu_backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        scratch = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            scratch = scratch @ scratch * 0
        late = Case(case.feats + scratch[0, 0], case.labels, k=case.k)
        got = everything(late, gpu_backend)
    stream.synchronize()
    judge.assert_same_bits(expected, got)


def test_other_device(gpu_backend: str) -> None:
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here, this takes two")
    case = large_case(500)
    moved = Case(case.feats.to("cuda:1"), case.labels.to("cuda:1"), k=case.k)
    assert torch.cuda.current_device() == 0
    judge.assert_same_bits(everything(case.on(gpu_backend), gpu_backend), everything(moved, gpu_backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [64, 700, 3000])
@pytest.mark.parametrize("name", ["unit-rows", "clusters-1e-4", "collapsed", "duplicate-groups", "outlier-x1000"])
def test_paths_select_the_same(name: str, rows: int, dtype: torch.dtype) -> None:
    """Every path that serves gives the neighbours of the direct one, distances to the bit."""
    case = problems.adversarial_case(name, rows, 200, dtype=dtype).on(require_gpu("cuda"))
    with forced("cuda", "direct"):
        expected = [*judge.neighbors_of(case, "cuda")]
    for path in PATHS:
        with forced("cuda", path):
            judge.assert_same_bits(expected, [*judge.neighbors_of(case, "cuda")])


def test_bank_path() -> None:
    """Few anchors, many candidates: read once, converted on the way."""
    case = problems.bank_case(200, 30000, 130, 500, self_kind="tensor").on(require_gpu("cuda"))
    with forced("cuda", "direct"):
        expected = [*judge.neighbors_of(case, "cuda")]
    for path in ("screen", "bank"):
        with forced("cuda", path):
            judge.assert_same_bits(expected, [*judge.neighbors_of(case, "cuda")])


@pytest.mark.parametrize(("rows", "dims"), [(8192, 512), (16384, 128)])
def test_memory(gpu_backend: str, rows: int, dims: int) -> None:
    """No N x M buffer: one cast copy, the candidate buffers and lists of fixed size a row."""
    case = large_case(rows, dims).on(gpu_backend).leaves()
    sn_ops.sn_loss(**case.arguments(), backend=gpu_backend).backward()
    case = case.leaves()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sn_ops.sn_loss(**case.arguments(), backend=gpu_backend).backward()
    beyond = torch.cuda.max_memory_allocated() - before - case.feats.nbytes
    a_row = 8 * 1024 + 4 * 128 + 1024  # candidate buffers, listed positives, records and the graph
    assert beyond < case.feats.nbytes // 2 + rows * a_row + 2**23


def test_agrees_with_cpu_at_size(gpu_backend: str) -> None:
    """A large batch, against the CPU backend: same loss, and the same neighbours but for rounding."""
    case = large_case(4096, 512)
    expected = sn_ops.sn_loss(**case.arguments(), reduction="none", backend="cpu")
    got = sn_ops.sn_loss(**case.on(gpu_backend).arguments(), reduction="none", backend=gpu_backend).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    ours = judge.neighbors_of(case.on(gpu_backend), gpu_backend).indices.cpu()
    theirs = judge.neighbors_of(case, "cpu").indices
    assert (ours == theirs).float().mean() > 0.999
