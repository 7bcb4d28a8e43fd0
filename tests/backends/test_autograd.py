"""Autograd of the loss, by the node in C++ and by the fallback in Python: what users do with the graph of a loss."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sn_ops
from sn_ops import dispatch, ops
from support import problems
from support.backends import require
from support.fresh_python import run
from support.problems import Case

NODES = {"cpu": "SupportNeighborLossBackward", "cpu_in_python": "_EagerLossBackward"}


@pytest.fixture(params=NODES)
def autograd(request: pytest.FixtureRequest) -> str:
    """A backend for each of the two."""
    return require(request.param)


def batch(seed: int = 0) -> Case:
    return problems.self_case(24, 16, 6, seed=seed).leaves()


def loss_of(case: Case, backend: str, **options: Any) -> Tensor:
    loss = sn_ops.sn_loss(**case.arguments(), backend=backend, **options)
    assert isinstance(loss, Tensor)
    return loss


def gradient(backend: str, case: Case | None = None) -> Tensor:
    case = batch() if case is None else case
    return torch.autograd.grad(loss_of(case, backend), case.feats)[0]


# ---- which one ------------------------------------------------------------------------------------


def test_the_package_was_built_for_this_torch() -> None:
    """The suite must not pass on the fallback alone."""
    assert dispatch.AUTOGRAD_REASON == "" and sn_ops.backends()["cpu"].autograd == "C++"
    assert sn_ops.backends()["reference"].autograd == "PyTorch"
    assert ops.OPERATORS["cpu"].node is not None


def test_each_makes_its_own_node(autograd: str) -> None:
    node = loss_of(batch(), autograd).grad_fn
    assert node is not None and node.name() == NODES[autograd]


def test_python_can_be_asked_for() -> None:
    done = run("-m", "sn_ops", SN_OPS_AUTOGRAD="python")
    assert "in Python: SN_OPS_AUTOGRAD asks for it" in done.stdout, done.stderr
    script = "import sn_ops; print(sn_ops.backends()['cpu'].autograd)"
    assert run("-c", script, SN_OPS_AUTOGRAD="python").stdout.strip() == "Python"
    assert run("-c", script).stdout.strip() == "C++"


def test_another_torch_is_served_in_python() -> None:
    """A wheel built elsewhere: the library is not even loaded."""
    core: Any = SimpleNamespace(build_info=lambda: {"torch": "2.10.0+other"})
    library, reason = dispatch._load_autograd(core)
    assert library is None and "built with torch 2.10.0+other" in reason and torch.__version__ in reason
    assert dispatch._load_autograd(None)[0] is None


# ---- what is done with a graph --------------------------------------------------------------------


def test_the_same_bits(autograd: str) -> None:
    assert gradient(autograd).equal(gradient("cpu"))
    for kind in ("none", "offset", "tensor"):
        case = problems.bank_case(12, 30, 16, 5, k=3, self_kind=kind).leaves()
        found, expected = (torch.autograd.grad(loss_of(case, name), case.inputs()) for name in (autograd, "cpu"))
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("want_stats", [False, True], ids=["loss", "loss-and-stats"])
def test_a_trace_has_the_same_bits(autograd: str, want_stats: bool) -> None:
    """`torch.jit.trace`: a traced loss can be called with other features, differentiated and saved."""
    case = batch()

    def call(feats: Tensor) -> tuple[Tensor, ...]:
        found = sn_ops.sn_loss(feats, case.labels, k=case.k, backend=autograd, return_stats=want_stats)
        return (found,) if isinstance(found, Tensor) else (found[0], *found[1])

    traced: Any = torch.jit.trace(call, (case.feats,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other = batch(seed=1)
    for function in (traced, torch.jit.load(file)):
        for leaf in (case.feats, other.feats):
            found, expected = function(leaf), call(leaf)
            assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
            assert [x.requires_grad for x in found] == [True] + [False] * (len(found) - 1)
            assert torch.autograd.grad(found[0], leaf)[0].equal(torch.autograd.grad(expected[0], leaf)[0])


@pytest.mark.parametrize("which", ["feats", "candidates"])
def test_a_side_that_needs_no_gradient_gets_none(autograd: str, which: str) -> None:
    case = problems.bank_case(12, 30, 16, 5, k=3, self_kind="none")
    both = case.leaves()
    wanted = dict(
        zip(("feats", "candidates"), torch.autograd.grad(loss_of(both, autograd), both.inputs()), strict=True)
    )
    leaf = getattr(case, which).clone().requires_grad_()
    loss = sn_ops.sn_loss(**{**case.arguments(), which: leaf}, backend=autograd)
    loss.backward()
    assert leaf.grad is not None and leaf.grad.equal(wanted[which])


def test_statistics_are_detached(autograd: str) -> None:
    case = batch()
    loss, stats = sn_ops.sn_loss(**case.arguments(), backend=autograd, return_stats=True)
    assert loss.requires_grad and not any(x.requires_grad for x in stats)
    assert torch.autograd.grad(loss, case.feats)[0].equal(gradient(autograd))


def test_no_graph_without_a_gradient(autograd: str) -> None:
    case = batch()
    with torch.no_grad():
        assert loss_of(case, autograd).grad_fn is None
    with torch.inference_mode():
        assert loss_of(case, autograd).is_inference()
    assert not sn_ops.sn_loss(case.feats.detach(), case.labels, backend=autograd).requires_grad


def test_hooks_run(autograd: str) -> None:
    """On the loss, on the features, on a tensor in between, before and behind the node."""
    case, seen = batch(), []
    middle = case.feats * 1
    middle.retain_grad()
    loss = sn_ops.sn_loss(middle, case.labels, backend=autograd)
    assert loss.grad_fn is not None
    loss.grad_fn.register_prehook(lambda grads: seen.append("before"))
    loss.grad_fn.register_hook(lambda inputs, outputs: seen.append("behind"))
    loss.register_hook(lambda grad: seen.append("loss"))
    case.feats.register_hook(lambda grad: 2 * grad)
    loss.backward()
    assert sorted(seen) == ["before", "behind", "loss"]
    assert middle.grad is not None and middle.grad.equal(gradient(autograd))
    assert case.feats.grad is not None and case.feats.grad.equal(2 * middle.grad)


def test_saved_tensors_go_through_hooks(autograd: str) -> None:
    packed: list[Tensor] = []

    def pack(x: Tensor) -> int:
        packed.append(x)
        return len(packed) - 1

    case = batch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda place: packed[place]):
        loss = loss_of(case, autograd)
    assert len(packed) == 3  # features, graph, statistics
    assert torch.autograd.grad(loss, case.feats)[0].equal(gradient(autograd))
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(case, autograd)
    assert torch.autograd.grad(loss, case.feats)[0].equal(gradient(autograd))


def test_a_graph_that_hooks_have_cut_is_refused(autograd: str) -> None:
    """What the operator refuses in a backward is a ValueError, as in a forward."""
    case = batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved[:-1]):
        loss = loss_of(case, autograd)
    with pytest.raises(ValueError, match="sn_ops::loss_backward: stats: expected"):
        loss.backward()


def test_anomaly_mode_names_the_node(autograd: str) -> None:
    case = batch()
    case.feats.data[3, 4] = float("nan")
    with (
        pytest.warns(UserWarning, match=f"Error detected in {NODES[autograd]}.*Traceback of forward"),
        torch.autograd.detect_anomaly(check_nan=True),
        pytest.raises(RuntimeError, match=f"'{NODES[autograd]}' returned nan values in its 0th output"),
    ):
        loss_of(case, autograd).backward()


def test_a_graph_serves_once_unless_it_is_kept(autograd: str) -> None:
    case = batch()
    loss = loss_of(case, autograd)
    loss.backward(retain_graph=True)
    loss.backward()
    assert case.feats.grad is not None and case.feats.grad.equal(2 * gradient(autograd))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_an_upstream_gradient_of_any_kind(autograd: str) -> None:
    case = batch()
    plain = gradient(autograd)
    (3 * loss_of(case, autograd)).backward()
    torch.testing.assert_close(case.feats.grad, 3 * plain)
    each = loss_of(case, autograd, reduction="none")
    weights = torch.linspace(0, 1, 48)[::2]  # with a stride
    found = torch.autograd.grad(each, case.feats, weights)[0]
    torch.testing.assert_close(
        found,
        torch.autograd.grad((each.detach() * 0 + loss_of(case, autograd, reduction="none")) @ weights, case.feats)[0],
    )


def test_what_would_lose_a_derivative_is_refused(autograd: str) -> None:
    """A batch of upstream gradients, and one with a forward-mode tangent."""
    case = batch()
    loss = loss_of(case, autograd)
    with pytest.raises(RuntimeError, match=r"is_grads_batched.*reference"):
        torch.autograd.grad(loss, case.feats, torch.ones(3), is_grads_batched=True, retain_graph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward-mode derivatives.*reference"):
        torch.autograd.grad(loss, case.feats, forward_ad.make_dual(torch.tensor(1.0), torch.tensor(2.0)))


def test_checkpointing(autograd: str) -> None:
    case = batch()
    loss = cast(
        Tensor, checkpoint(lambda x: sn_ops.sn_loss(x, case.labels, backend=autograd), case.feats, use_reentrant=False)
    )
    loss.backward()
    assert case.feats.grad is not None and case.feats.grad.equal(gradient(autograd))


def test_nothing_outlives_the_loss(autograd: str) -> None:
    """The node holds what it saved, and nobody holds the node."""
    leaf = batch().feats
    for backward in (False, True):
        feats = leaf * 1
        storage = StorageWeakRef(feats.untyped_storage())
        loss = sn_ops.sn_loss(feats, batch().labels, backend=autograd)
        del feats
        assert not storage.expired()
        if backward:
            loss.backward()  # frees what was saved
            assert storage.expired()
        del loss
        assert storage.expired()


def test_threads(autograd: str) -> None:
    """Calls at the same time, each with its backward, are as good as alone."""
    wanted = [gradient(autograd, batch(seed)) for seed in range(4)]
    found: dict[int, list[Tensor]] = {}

    def work(seed: int) -> None:
        found[seed] = [gradient(autograd, batch(seed)) for _ in range(30)]

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(x.equal(wanted[seed]) for seed in range(4) for x in found[seed])


def test_modes_and_subclasses_see_the_operators(autograd: str) -> None:
    class Functions(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Subclass(Tensor):
        pass

    seen: list[str] = []
    with Functions():
        loss_of(batch(), autograd)
    assert any("sn_ops.loss" in name for name in seen), seen
    seen = []
    with Dispatched():
        gradient(autograd)
    assert [name for name in seen if "sn_ops" in name] == ["sn_ops.loss.default", "sn_ops.loss_backward.default"]

    case = batch()
    feats = case.feats.detach().as_subclass(Subclass).requires_grad_()
    loss = sn_ops.sn_loss(feats, case.labels, backend=autograd)
    assert torch.autograd.grad(loss, feats)[0].as_subclass(Tensor).equal(gradient(autograd))


def test_make_fx_traces_forward_and_backward(autograd: str) -> None:
    case = batch()
    traced = make_fx(lambda x: torch.autograd.grad(sn_ops.sn_loss(x, case.labels, backend=autograd), x)[0])(case.feats)
    called = [str(node.target) for node in traced.graph.nodes if "sn_ops" in str(node.target)]
    assert called == ["sn_ops.loss.default", "sn_ops.loss_backward.default"]
    assert traced(case.feats).equal(gradient(autograd))


def test_compiled_autograd(autograd: str) -> None:
    """The backward pass alone is compiled, with the node in it."""
    from torch._dynamo import compiled_autograd

    for case in (batch(), problems.bank_case(12, 30, 16, 5, k=3, self_kind="none").leaves()):
        wanted = torch.autograd.grad(loss_of(case, autograd), case.inputs())
        for _ in range(2):
            loss = loss_of(case, autograd)
            for x in case.inputs():
                x.grad = None
            with compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
            torch.testing.assert_close([x.grad for x in case.inputs()], list(wanted), rtol=0, atol=0)
    torch._dynamo.reset()
