"""The loss inside PyTorch: compilation, export, autocast, deterministic mode, vmap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import sn_ops
from sn_ops import ops
from support import problems
from support.backends import FUSED, device_of
from support.problems import Case, on


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(case: Case, **options: Any) -> tuple[torch.Tensor, ...]:
    """Loss and gradients."""
    leaves = case.leaves()
    loss = sn_ops.sn_loss(**leaves.arguments(), **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves.inputs())


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_whole_graph_with_dynamic_batch(backend: str, compiler: str) -> None:
    """Forward and backward in one graph; the second batch size makes it dynamic, the third compiles nothing."""
    if compiler == "inductor" and backend not in FUSED:
        compiler = "eager"  # nobody needs generated code of the dense reference, and it takes a minute
    counter = CompileCounterWithBackend(compiler)
    matrix = on(backend, torch.randn(20, 12, generator=torch.Generator().manual_seed(0)))

    def loss(x: torch.Tensor, y: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        feats = torch.nn.functional.normalize(x @ m, dim=1)
        return 2 * sn_ops.sn_loss(feats, y, k=4, alpha=5.0, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in (24, 33, 50, 41):
        case = problems.self_case(rows, 20, 6, seed=rows).on(backend)
        results = []
        for function in (loss, compiled):
            m = matrix.clone().requires_grad_()
            value = function(case.feats, case.labels, m)
            value.backward()
            results.append((value.detach(), m.grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for four batch sizes"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["none", "offset", "tensor"])
def test_compile_with_a_bank(backend: str, kind: str, reduction: str) -> None:
    """Candidates, self_index of every kind, statistics."""
    case = problems.bank_case(12, 30, 16, 5, k=3, self_kind=kind).on(backend)
    options: dict[str, Any] = {"backend": backend, "reduction": reduction, "return_stats": True}

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def call(feats: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, sn_ops.SNStats]:
        return sn_ops.sn_loss(
            feats, case.labels, candidates=candidates, candidate_labels=case.candidate_labels,
            self_index=case.self_index, k=3, **options,
        )  # fmt: skip

    leaves, plain = case.leaves(), case.leaves()
    loss, stats = call(*leaves.inputs())
    expected, wanted = sn_ops.sn_loss(**plain.arguments(), **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(tuple(stats), tuple(wanted))
    grads = torch.autograd.grad(loss.sum(), leaves.inputs())
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), plain.inputs()))


def test_compiled_support_neighbors(backend: str) -> None:
    case = problems.self_case(30, 16, 5, k=3).on(backend)
    compiled = torch.compile(sn_ops.support_neighbors, fullgraph=True, backend="aot_eager")
    found = compiled(case.feats, case.labels, k=3, backend=backend)
    torch.testing.assert_close(
        tuple(found), tuple(sn_ops.support_neighbors(case.feats, case.labels, k=3, backend=backend))
    )


def test_compiled_module(backend: str) -> None:
    case = problems.self_case(30, 16, 5).on(backend)
    module = sn_ops.SNLoss(backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.feats, case.labels), module(case.feats, case.labels))


def test_export_with_dynamic_batch(backend: str) -> None:
    """An exported program computes other batch sizes than the one it was exported with."""
    module = sn_ops.SNLoss(k=3, backend=backend)
    example = problems.self_case(16, 8, 4).on(backend)
    batch = torch.export.Dim("batch", min=8, max=4096)
    program = torch.export.export(module, (example.feats, example.labels), dynamic_shapes=({0: batch}, {0: batch}))
    for rows in (16, 37, 100):
        case = problems.self_case(rows, 8, 4, seed=rows).on(backend)
        torch.testing.assert_close(program.module()(case.feats, case.labels), module(case.feats, case.labels))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_nothing(backend: str, low: torch.dtype) -> None:
    """The loss is computed in the type of its inputs, forward and backward, in or out of autocast."""
    for dtype in (torch.float32, torch.float64, low):
        case = problems.self_case(33, 20, 6).to(dtype).on(backend)
        expected = step(case, backend=backend)
        with torch.autocast(device_of(backend).type, dtype=low):
            found = step(case, backend=backend)
        assert all(a.dtype == b.dtype and a.equal(b) for a, b in zip(found, expected, strict=True))


def test_autocast_of_the_network_in_front(backend: str) -> None:
    """Half-precision features from autocast get a float32 loss and send back half-precision gradients."""
    case = problems.self_case(33, 20, 6).on(backend)
    matrix = on(backend, torch.randn(20, 12, generator=torch.Generator().manual_seed(0))).requires_grad_()
    with torch.autocast(device_of(backend).type, dtype=torch.bfloat16):
        feats = case.feats @ matrix
        assert feats.dtype == torch.bfloat16
        loss = sn_ops.sn_loss(feats, case.labels, alpha=1.0, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32 and matrix.grad is not None and matrix.grad.isfinite().all()
    assert matrix.grad.any()


@pytest.mark.parametrize("name", ["self-33x65-ids8-k10", "bank-33-65x100-k1-tensor", "no-positives", "no-candidates"])
def test_deterministic_mode(backend: str, name: str) -> None:
    """Runs, with the same bits. PyTorch fills fresh memory with NaN in this mode: nothing may be left unwritten."""
    case = problems.CASES[name]().on(backend)
    expected = step(case, backend=backend, reduction="none")
    neighbors = sn_ops.support_neighbors(**case.arguments(), backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        found = step(case, backend=backend, reduction="none")
        again = sn_ops.support_neighbors(**case.arguments(), backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(a.equal(b) for a, b in zip((*found, *again), (*expected, *neighbors), strict=True))


@pytest.mark.parametrize("banked", [False, True])
def test_vmap(backend: str, banked: bool) -> None:
    """Over several batches at once: the reference gives the loss of each, fused backends refuse and name it."""
    cases = [problems.bank_case(6, 9, 5, 3, k=2, seed=seed).on(backend) for seed in range(3)]
    feats, labels = torch.stack([c.feats for c in cases]), torch.stack([c.labels for c in cases])
    bank = cases[0]

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not banked:
            return sn_ops.sn_loss(x, y, k=2, backend=backend)
        return sn_ops.sn_loss(
            x, y, k=2, backend=backend, candidates=bank.candidates, candidate_labels=bank.candidate_labels
        )

    if backend in FUSED:
        with pytest.raises(RuntimeError, match=r"vmap.*reference"):
            torch.vmap(loss)(feats, labels)
        return
    expected = torch.stack([loss(x, y) for x, y in zip(feats, labels, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(feats, labels), expected)


def test_functional_gradient(backend: str) -> None:
    """torch.func.grad_and_value agrees with autograd in the reference, and is refused by fused backends."""
    case = problems.self_case(12, 6, 3, 3).on(backend)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return sn_ops.sn_loss(x, case.labels, k=3, backend=backend)

    if backend in FUSED:
        with pytest.raises(RuntimeError, match=r"torch\.func.*reference"):
            torch.func.grad_and_value(loss)(case.feats)
        return
    gradient, value = torch.func.grad_and_value(loss)(case.feats)
    torch.testing.assert_close((value, gradient), step(case, backend=backend))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("way", ["transform", "tangent inside", "tangent outside"])
@pytest.mark.filterwarnings("ignore")  # of Dynamo, about what it does not trace
def test_forward_mode_under_compile(fused_backend: str, way: str, fullgraph: bool) -> None:
    """A compiled graph would drop tangents, and derivatives be 0: it is refused as eager calls are."""
    case = problems.self_case(12, 6, 3, 3).on(fused_backend)
    tangent = torch.ones_like(case.feats)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return sn_ops.sn_loss(x, case.labels, k=3, backend=fused_backend)

    def derivative(x: torch.Tensor) -> Any:
        if way == "transform":
            return torch.func.jvp(loss, (x,), (tangent,))[1]
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent

    compiled = torch.compile(loss if way == "tangent outside" else derivative, backend="eager", fullgraph=fullgraph)
    outside = forward_ad.dual_level() if way == "tangent outside" else nullcontext()
    refused = pytest.raises(RuntimeError, match=r"(torch\.func|forward-mode).*reference")
    with outside, refused:
        compiled(forward_ad.make_dual(case.feats, tangent) if way == "tangent outside" else case.feats)


def test_forward_mode_of_operators(fused_backend: str) -> None:
    """Calls of the operators themselves refuse tangents, of features and of candidates."""
    case = problems.bank_case(6, 9, 5, 3, k=2).on(fused_backend)
    candidates = cast(torch.Tensor, case.candidates)
    operators = ops.OPERATORS[fused_backend]
    with forward_ad.dual_level():
        for feats, bank in (
            (forward_ad.make_dual(case.feats, case.feats), candidates),
            (case.feats, forward_ad.make_dual(candidates, candidates)),
        ):
            args = (feats, case.labels, bank, case.candidate_labels, None, 0, 2, 50.0, 0.1, 0, 0)
            with pytest.raises(RuntimeError, match=r"forward-mode derivatives.*reference"):
                operators.loss(*args)
            with pytest.raises(RuntimeError, match=r"forward-mode derivatives.*reference"):
                operators.forward(*args, False)


def test_several_threads_call_at_once(fused_backend: str) -> None:
    """No state is shared between calls: concurrent ones return what they return alone."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [problems.self_case(150 + 7 * i, 40, 20, seed=i).on(fused_backend) for i in range(6)]
    expected = [step(case, backend=fused_backend) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda case: step(case, backend=fused_backend), cases * 4))
    for i, result in enumerate(found):
        assert all(a.equal(b) for a, b in zip(result, expected[i % 6], strict=True))
