"""The loss over all ranks: its gradients, its totals, its autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .. import ops, reference
from ..reference import Graph
from .agreement import agree, take_on_trust
from .collectives import gather_equal, pass_on, reduce_scatter, travel
from .exchange import Call, Plan, check_group
from .rows import Rows
from .search import gather_graph, ring_graph

# ---- gradients ------------------------------------------------------------------------------------


class _Backward(NamedTuple):
    """What the gradients of a rank's loss are computed from."""

    backend: str
    upstream: Tensor  # the loss's gradient, times world size
    feats: Tensor  # [N, D]
    indices: Tensor  # [N, K + 2] int32
    coefficients: Tensor  # [N, K + 2] acc
    stats: Tensor  # [6], global
    reduction: int
    need_feats: bool

    def through(self, candidates: Tensor, first: int, need_candidates: bool) -> tuple[Tensor, Tensor]:
        """The gradients of the anchors and of one part's candidates `[m, D]`, from the edges between them."""
        inside = (self.indices >= first) & (self.indices < first + candidates.shape[0])
        return ops.backward(
            self.backend, self.upstream, self.feats, candidates,
            (self.indices - first).where(inside, -1), self.coefficients.where(inside, 0.0),
            self.stats, self.reduction, self.need_feats, need_candidates,
        )  # fmt: skip


def _gather_gradient(plan: Plan, job: _Backward, rows: Rows) -> Tensor:
    """`[N, D]` acc: the gradient of this rank's features, without what a bank adds."""
    acc = reference.accumulation_dtype(job.feats.dtype)
    own, pushed = job.through(rows.feats, 0, True)
    returned = reduce_scatter(plan, pushed).to(acc)
    return own.to(acc) + returned if job.need_feats else returned


def _ring_gradient(plan: Plan, job: _Backward, rows: Rows) -> Tensor:
    """The same from batches that travel.

    The gradient of a batch travels behind it and returns to its owner as the sum over all ranks, added in the order of
    the ring in the accumulation type.
    """
    acc = reference.accumulation_dtype(job.feats.dtype)
    job = job._replace(feats=job.feats.to(acc))
    own = torch.zeros_like(job.feats)
    gradient = None
    pending: list[Any] = []
    for owner, data in travel(plan, rows.data):
        mine, pushed = job.through(rows.with_data(data).feats.to(acc), plan.start(owner), True)
        if job.need_feats:
            own += mine
        for work in pending:
            work.wait()
        if gradient is not None:
            pushed += gradient
        gradient = pushed.new_empty((plan.sizes[(owner - 1) % plan.world], pushed.shape[1]))
        pending = pass_on(plan, pushed, gradient)
    for work in pending:
        work.wait()
    assert gradient is not None  # a group has a rank
    return own + gradient


# ---- totals over ranks ----------------------------------------------------------------------------


def _local_totals(call: Call, graph: Graph) -> Tensor:
    """`[9]` float64: what this rank adds to the loss and to the statistics, and its poison."""
    stats = graph.stats.double()
    valid, positive_mean, negative_mean, nearest_is_positive, support_positives, poison = stats.unbind()
    none = call.reduction == reference.Reduction.NONE
    loss_sum = torch.zeros_like(valid) if none else graph.value.double()
    positives = negatives = torch.zeros_like(valid)
    if call.want_stats:
        # The operator returns means; their counts are read from the graph.
        inside = valid * support_positives
        outside = (graph.indices[:, -2] >= 0).sum()
        positives = inside + outside
        negatives = ((graph.indices[:, :-2] >= 0) & (graph.nearest >= 0)[:, None]).sum() - inside
    return torch.stack([
        loss_sum, valid, positives, positives * positive_mean, negatives, negatives * negative_mean,
        valid * nearest_is_positive, valid * support_positives, poison,
    ])  # fmt: skip


def _globalise(call: Call, plan: Plan, graph: Graph) -> tuple[Tensor, Tensor]:
    """The loss over all ranks (with "none", of the own anchors) and the global statistics `[6]`."""
    totals = gather_equal(plan.group, _local_totals(call, graph), plan.world).sum(0)
    loss_sum, valid, positives, positive_sum, negatives, negative_sum, nearest, inside, poison = totals.unbind()

    def ratio(total: Tensor, count: Tensor) -> Tensor:
        return total / count.clamp(min=1)

    stats = torch.stack([
        valid, ratio(positive_sum, positives), ratio(negative_sum, negatives),
        ratio(nearest, valid), ratio(inside, valid), poison,
    ])  # fmt: skip
    acc = graph.value.dtype
    if call.reduction == reference.Reduction.NONE:
        return graph.value + poison.to(acc), stats
    return (ratio(loss_sum, valid) if call.reduction == reference.Reduction.MEAN else loss_sum).to(acc), stats


# ---- autograd ---------------------------------------------------------------------------------------


class _OneDerivative(torch.autograd.Function):
    """The identity, whose derivative is refused."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *reasons: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError(
            "sn_ops: second derivatives are not available with group=. Gather the features yourself "
            "(torch.distributed.nn.functional.all_gather) and pass them as candidates with backend='reference'."
        )


class _GroupLoss(torch.autograd.Function):
    """The loss and the statistics over all ranks.

    `token` requires a gradient whenever backward is a collective. So does then the loss of a rank whose features need
    none, and its backward() takes part.
    """

    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, bank: Tensor | None, token: Tensor, call: Call, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        graph, rows = (ring_graph if plan.ring else gather_graph)(call, plan)
        value, stats = _globalise(call, plan, graph)
        ctx.save_for_backward(feats, bank, rows, graph.indices, graph.coefficients, stats)
        ctx.plan, ctx.backend, ctx.reduction = plan, call.backend, call.reduction
        ctx.mark_non_differentiable(stats)
        return value, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        feats, bank, data, indices, coefficients, stats = ctx.saved_tensors
        plan: Plan = ctx.plan
        need_feats, need_bank = ctx.needs_input_grad[:2]
        grad_bank = None
        with torch.no_grad():
            upstream = grad_loss.detach() * plan.world
            job = _Backward(
                ctx.backend, upstream, feats.detach(), indices, coefficients, stats, ctx.reduction, need_feats
            )
            rows = Rows(data, feats.shape[1], feats.dtype)
            gradient = (_ring_gradient if plan.ring else _gather_gradient)(plan, job, rows)
            if bank is not None:
                own, pushed = job.through(bank.detach(), plan.total, need_bank)
                gradient = gradient + own if need_feats else gradient
                grad_bank = pushed if need_bank else None
            grad_feats = gradient.to(feats.dtype) if need_feats else None
        return (*_once((grad_feats, grad_bank), grad_loss, feats), None, None, None)


def _once(gradients: tuple[Tensor | None, ...], *reasons: Tensor) -> list[Tensor | None]:
    """The gradients; under create_graph=True, gradients that cannot be differentiated again."""
    if not torch.is_grad_enabled():
        return list(gradients)
    return [None if gradient is None else _OneDerivative.apply(gradient, *reasons) for gradient in gradients]


@torch.compiler.disable(reason="sn_ops: group= runs collectives whose sizes the ranks agree on as they run")
def loss(group: Any, sizes: Sequence[int] | None, prepare: Callable[[], Call]) -> tuple[Tensor, Tensor]:
    """The loss over all ranks and the global statistics `[6]`, as `reference.loss` returns them.

    Args:
        group: a process group or `Exchange`.
        sizes: the rows of every rank in rank order: ranks agree on nothing and nothing waits for the host. Options,
            dtypes, columns and the sizes themselves are then not compared between ranks, a rank that raises leaves the
            others waiting for the group's timeout, and with grad mode on the loss always requires a gradient.
        prepare: checks this rank's arguments; called here, so that what it raises reaches the other ranks.

    Raises:
        TypeError, ValueError: from `prepare`, or for a bad group or sizes.
        ValueError: the ranks' options differ (on every rank).
        RuntimeError: another rank was given bad input (it raises the error itself).
    """
    exchange = check_group(group)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("sn_ops: group= is not available in the transforms of torch.func (vmap, grad, jvp, ...)")
    if sizes is None:
        call, plan = agree(exchange, prepare)
    else:
        call = prepare()
        plan = take_on_trust(exchange, call, sizes)
    token = torch.empty((), requires_grad=plan.joins)
    pair: tuple[Tensor, Tensor] = _GroupLoss.apply(call.feats, call.bank, token, call, plan)
    return pair
