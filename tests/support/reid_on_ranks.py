"""What tests/reid runs on ranks. Each function takes the process group first; arguments and results are pickled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sn_ops.distributed import all_gather_rows
from sn_ops.reid.config import LossConfig
from sn_ops.reid.ddp import sync_batchnorm
from sn_ops.reid.losses import build_losses


def metric_loss(
    group: Any, config: LossConfig, shards: Sequence[tuple[Tensor, Tensor]], banks: Sequence[dict[str, Any]] | None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, statistics and gradient of this rank's shard."""
    feats, labels = shards[dist.get_rank(group)]
    feats = feats.clone().requires_grad_()
    bank = {} if banks is None else banks[dist.get_rank(group)]
    loss, stats = build_losses(config).metric(feats, labels, **bank, group=group)
    loss.backward()
    assert feats.grad is not None
    return loss.detach(), stats, feats.grad


def identity_loss(
    group: Any, smoothing: float, shards: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, statistics and gradient of this rank's shard."""
    logits, labels = shards[dist.get_rank(group)]
    logits = logits.clone().requires_grad_()
    identity = build_losses(LossConfig(identity=1.0, label_smoothing=smoothing)).identity
    assert identity is not None
    loss, stats = identity(logits, labels, group=group)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), stats, logits.grad


def gathered(group: Any, shards: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, int, Tensor]:
    """All rows, the offset of this rank's, and the gradient of a weighted sum that differs from rank to rank."""
    rank = dist.get_rank(group)
    rows = shards[rank].clone().requires_grad_()
    everyone, start = all_gather_rows(rows, group)
    (everyone * weights[rank]).sum().backward()
    assert rows.grad is not None
    return everyone.detach(), start, rows.grad


def step(
    group: Any, model: nn.Module, config: LossConfig, shards: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """One forward and backward of a network under DistributedDataParallel: loss, gradients, buffers."""
    images, labels = shards[dist.get_rank(group)]
    model = DistributedDataParallel(sync_batchnorm(model, group), process_group=group)
    model.train()
    output = model(images)
    losses = build_losses(config)
    loss, _ = losses.metric(output.embedding, labels, group=group)
    if losses.identity is not None:
        loss = loss + losses.identity(output.logits, labels, group=group)[0]
    loss.backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: buffer.clone() for name, buffer in model.module.named_buffers()}


def batch_norm(
    group: Any, norm: nn.Module, shards: Sequence[Tensor], upstream: Sequence[Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output and input gradient of a batch norm over all ranks, and its state."""
    rank = dist.get_rank(group)
    values = shards[rank].clone().requires_grad_()
    network = sync_batchnorm(nn.Sequential(norm), group)
    out = network(values)
    out.backward(upstream[rank])
    assert values.grad is not None
    return out.detach(), values.grad, {name: t.detach().clone() for name, t in network.state_dict().items()}
