"""What the loss' tests run on ranks. Each function takes the process group first; arguments and results are pickled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sn_ops
from sn_ops.distributed import Exchange, all_gather_rows, collectives, exchange, search
from sn_ops.distributed import loss as group_loss
from sn_ops.reference import Graph


class Shard(NamedTuple):
    """One rank's arguments."""

    feats: Tensor
    labels: Tensor
    candidates: Tensor | None = None
    candidate_labels: Tensor | None = None
    self_index: int | Tensor | None = None


class Result(NamedTuple):
    """What a rank saw."""

    loss: Tensor
    stats: sn_ops.SNStats
    gradients: list[Tensor | None]  # of feats, of candidates
    indices: Tensor  # [N, K + 2]
    nearest: Tensor
    farthest: Tensor
    collectives: list[str]


COLLECTIVES = (
    "all_gather_single", "all_gather_into_tensor", "all_gather", "broadcast", "reduce_scatter_single",
    "reduce_scatter_tensor", "reduce_scatter", "all_to_all_single", "all_reduce", "batch_isend_irecv",
)  # fmt: skip


def _through(group: Any, mode: str) -> Any:
    return group if mode == "auto" else Exchange(group, mode=mode)


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the collectives that are called meanwhile."""
    names: list[str] = []

    def count(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return original(*args, **kwargs)

        return call

    places = [(dist, name) for name in COLLECTIVES if hasattr(dist, name)]
    places += [(collectives, name) for name in ("_all_gather_single", "_reduce_scatter_single")]
    with ExitStack() as patches:
        for at, name in places:
            patches.enter_context(mock.patch.object(at, name, count(name, getattr(at, name))))
        yield names


def loss_and_gradients(
    group: Any, shards: Sequence[Shard], options: dict[str, Any], mode: str = "auto", upstream: Sequence[Tensor] = ()
) -> Result:
    """The loss of this rank's shard, its gradients and selection. `upstream`: what each rank backpropagates."""
    rank = dist.get_rank(group)
    shard = shards[rank]
    feats = shard.feats.clone().requires_grad_()
    bank = None if shard.candidates is None else shard.candidates.clone().requires_grad_()
    seen: list[Graph] = []

    def keep(call: exchange.Call, plan: Any, graph: Graph) -> tuple[Tensor, Tensor]:
        seen.append(graph)
        return globalise(call, plan, graph)

    globalise = group_loss._globalise
    with mock.patch.object(group_loss, "_globalise", keep), counted() as names:
        loss, stats = sn_ops.sn_loss(
            feats, shard.labels, candidates=bank, candidate_labels=shard.candidate_labels,
            self_index=shard.self_index, group=_through(group, mode), return_stats=True, **options,
        )  # fmt: skip
        loss.backward(upstream[rank] if upstream else torch.ones_like(loss))
    graph = seen[0]
    gradients = [feats.grad, None if bank is None else bank.grad]
    return Result(loss.detach(), stats, gradients, graph.indices, graph.nearest, graph.farthest, names)


def large_tensors(group: Any, shards: Sequence[Shard], mode: str, size: int) -> tuple[list[int], list[int]]:
    """Bytes of the new tensors of at least `size` bytes that the forward and the backward make, largest first."""

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that none takes another's address

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= size:
                    self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return out

    shard = shards[dist.get_rank(group)]
    feats = shard.feats.clone().requires_grad_()
    with Watch() as forward:
        loss = sn_ops.sn_loss(feats, shard.labels, group=_through(group, mode))
    with Watch() as backward:
        loss.backward()
    made = [x for at, x in backward.storages.items() if at not in forward.storages]
    return tuple(sorted((x.nbytes() for x in xs), reverse=True) for xs in (forward.storages.values(), made))  # type: ignore[return-value]


def module_with_sizes(group: Any, shards: Sequence[Shard], sizes: Sequence[int]) -> Tensor:
    """`SNLoss` called with `sizes=`."""
    shard = shards[dist.get_rank(group)]
    loss = sn_ops.SNLoss(group=group)(shard.feats, shard.labels, sizes=sizes)
    assert isinstance(loss, Tensor)
    return loss.detach()


def takes_the_ring(group: Any, shards: Sequence[Shard], limit: int) -> bool:
    """Whether the ring is taken under a limit of bytes."""
    shard = shards[dist.get_rank(group)]
    with mock.patch.object(group_loss, "ring_graph", wraps=search.ring_graph) as ring:
        sn_ops.sn_loss(shard.feats, shard.labels, group=Exchange(group, ring_above=limit))
    return bool(ring.called)


def just_call(group: Any, calls: Sequence[dict[str, Any]], mode: str = "auto") -> Tensor:
    """`sn_loss(**calls[rank])`; errors travel to the test."""
    arguments = dict(calls[dist.get_rank(group)])
    with torch.no_grad() if arguments.pop("no_grad", False) else nullcontext():
        return sn_ops.sn_loss(**arguments, group=_through(group, mode)).detach()


def backward_where_some_need_none(
    group: Any, shards: Sequence[Shard], needs: Sequence[bool], mode: str, sizes: Sequence[int] | None
) -> tuple[bool, Tensor | None]:
    """Every rank runs backward; whether the loss required a gradient, and the features' gradient."""
    rank = dist.get_rank(group)
    feats = shards[rank].feats.clone().requires_grad_(needs[rank])
    loss = sn_ops.sn_loss(feats, shards[rank].labels, group=_through(group, mode), sizes=sizes)
    if loss.requires_grad:
        loss.backward()
    return loss.requires_grad, feats.grad


def network(dims: int) -> nn.Sequential:
    """The same on every rank and in the one process."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(dims, 32), nn.Tanh(), nn.Linear(32, 16))


def train(
    group: Any, steps: Sequence[Sequence[Shard]], parallel: bool, accumulate: bool, amp: bool, mode: str = "auto"
) -> list[Tensor]:
    """Parameter gradients after backward through every step's shards, summed over steps.

    With `parallel`, DistributedDataParallel averages over ranks; without, the ranks do as the documentation says:
    divide the loss by the world size and sum gradients. With `accumulate` only the last step is synchronised.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    plain = network(steps[0][0].feats.shape[1])
    model = DistributedDataParallel(plain, process_group=group) if parallel else plain
    criterion = sn_ops.SNLoss(group=_through(group, mode))
    for at, shards in enumerate(steps):
        last = at == len(steps) - 1
        quiet = parallel and accumulate and not last
        assert not quiet or isinstance(model, DistributedDataParallel)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and quiet else nullcontext():
            with torch.autocast("cpu", torch.bfloat16) if amp else nullcontext():
                embeddings = model(shards[rank].feats)
            loss = criterion(nn.functional.normalize(embeddings.float(), dim=1), shards[rank].labels)
            assert isinstance(loss, Tensor)
            (loss if parallel else loss / world).backward()
    gradients = [p.grad.clone() for p in plain.parameters() if p.grad is not None]
    if not parallel:
        for gradient in gradients:
            dist.all_reduce(gradient, group=group)
    return gradients


def differentiate_twice(group: Any, shards: Sequence[Shard], backend: str) -> None:
    """Asks for a second derivative."""
    shard = shards[dist.get_rank(group)]
    feats = shard.feats.clone().requires_grad_()
    loss = sn_ops.sn_loss(feats, shard.labels, group=group, backend=backend)
    (gradient,) = torch.autograd.grad(loss, feats, create_graph=True)
    assert gradient.requires_grad
    gradient.sum().backward()


def compiled(group: Any, shards: Sequence[Shard], fullgraph: bool) -> tuple[Tensor, Tensor | None]:
    """A compiled function around the loss."""
    shard = shards[dist.get_rank(group)]
    feats = shard.feats.clone().requires_grad_()
    torch._dynamo.reset()  # it caches by code object, whatever `fullgraph` is

    @torch.compile(backend="eager", fullgraph=fullgraph)
    def step(x: Tensor) -> Tensor:
        return sn_ops.sn_loss(x * 1.0, shard.labels, group=group) * 1.0

    loss = step(feats)
    loss.backward()
    return loss.detach(), feats.grad


def vmapped(group: Any, shards: Sequence[Shard]) -> None:
    """A transform of torch.func around the loss."""
    shard = shards[dist.get_rank(group)]
    torch.func.grad(lambda x: sn_ops.sn_loss(x, shard.labels, group=group))(shard.feats)


def represent(group: Any) -> list[str]:
    """The repr of the module and of the exchange."""
    return [repr(sn_ops.SNLoss(group=group)), repr(Exchange(group, mode="ring"))]


def bad_exchange(group: Any, arguments: dict[str, Any]) -> None:
    """An `Exchange` with arguments that it refuses."""
    Exchange(group, **arguments)


def wrapped_by_pml(group: Any, shards: Sequence[Shard], kind: str, options: dict[str, Any]) -> list[Tensor]:
    """Parameter gradients under PML's DistributedLossWrapper, which gathers from the default group."""
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    from sn_ops import metric_learning

    shard = shards[dist.get_rank(group)]
    model = DistributedDataParallel(network(shard.feats.shape[1]), process_group=group)
    loss_func: Any = metric_learning.SNLoss(**options)
    if kind == "memory":
        loss_func = metric_learning.CrossBatchMemory(loss_func, embedding_size=16, memory_size=64)
    DistributedLossWrapper(loss_func, efficient=kind == "efficient")(model(shard.feats), shard.labels).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def overwrite_bank(group: Any, shards: Sequence[Shard], mode: str) -> None:
    """Writes to the bank between the loss and its gradient."""
    feats, labels, candidates, candidate_labels, self_index = shards[dist.get_rank(group)]
    assert candidates is not None
    loss = sn_ops.sn_loss(
        feats.clone().requires_grad_(), labels, candidates=candidates, candidate_labels=candidate_labels,
        self_index=self_index, group=_through(group, mode),
    )  # fmt: skip
    candidates[0] = 0
    loss.backward()


class Gathered(NamedTuple):
    """What a rank got from `all_gather_rows`."""

    everyone: Tensor
    start: int
    gradient: Tensor | None
    collectives: list[str]


def gather_rows(group: Any, rows: Sequence[Tensor], upstream: Sequence[Tensor] = ()) -> Gathered:
    """`all_gather_rows` of this rank's rows, and their gradient if there is an upstream one for each rank."""
    rank = dist.get_rank(group)
    leaf = rows[rank].clone().requires_grad_(bool(upstream))
    with counted() as names:
        everyone, start = all_gather_rows(leaf, group)
        if upstream:
            everyone.backward(upstream[rank])
    return Gathered(everyone.detach(), start, leaf.grad, names)


def gather_and_differentiate_twice(group: Any, rows: Sequence[Tensor]) -> None:
    """Asks for a second derivative of what was gathered."""
    leaf = rows[dist.get_rank(group)].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(all_gather_rows(leaf, group)[0].square().sum(), leaf, create_graph=True)
    gradient.sum().backward()


def gather_what_cannot_be(group: Any, rows: Any, of_group: bool) -> None:
    """`all_gather_rows` with rows or a group that it refuses."""
    all_gather_rows(rows, group if of_group else "everyone")
