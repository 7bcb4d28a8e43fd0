"""Batch norm over the batches of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum over all ranks; its derivative is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class GroupBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks, on any device (`torch.nn.SyncBatchNorm` needs a GPU).

    It replaces `of` and shares its parameters and statistics. In evaluation mode it is ordinary batch norm. Shapes
    `[n, C, ...]`; n may differ between ranks.
    """

    def __init__(self, of: nn.modules.batchnorm._BatchNorm, group: Any) -> None:
        super().__init__(of.num_features, of.eps, of.momentum, of.affine, of.track_running_stats)
        self.group = group
        self._parameters.update(of._parameters)
        self._buffers.update(of._buffers)
        self.train(of.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"sn_ops.reid: batch norm: expected [n, C, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        column = (1, -1) + (1,) * (input.dim() - 2)
        values = input if input.dtype is torch.float64 else input.float()  # half precision cannot sum 1000 values
        many = values.new_full((1,), values.numel() / values.shape[1])
        dist.all_reduce(many, group=self.group)
        # In two passes: the mean of squares minus the squared mean loses digits.
        mean = _Sum.apply(values.sum(axes), self.group) / many
        centred = values - mean.view(column)
        variance = _Sum.apply(centred.square().sum(axes), self.group) / many
        if self.track_running_stats:
            self._track(mean.detach(), (variance * (many / (many - 1).clamp(min=1))).detach())
        normal = centred * (variance + self.eps).rsqrt().view(column)
        if self.affine:
            normal = normal * self.weight.view(column) + self.bias.view(column)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked += 1
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


def sync_batchnorm(model: nn.Module, group: Any) -> nn.Module:
    """Makes every batch norm of a network take the statistics of all ranks' batches, as one process would.

    Args:
        model: changed in place; names, parameters and statistics stay. Call it before DistributedDataParallel wraps
            the model.
        group: the process group.

    Returns:
        The model: with `torch.nn.SyncBatchNorm` on GPUs, `GroupBatchNorm` elsewhere.

    Raises:
        ValueError: a subclass of batch norm that computes more (timm has some), or a model that is itself a batch norm.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for name, norm in norms.items():
        if name == "" or type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise ValueError(
                "sn_ops.reid: batch norm: expected BatchNorm1d, BatchNorm2d or BatchNorm3d inside a network, got "
                f"{type(norm).__name__} {name!r}; with run.sync_batchnorm=false every rank takes the statistics of its "
                "own images, and any network will do"
            )
    if any(parameter.is_cuda for parameter in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    for name, norm in norms.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, GroupBatchNorm(norm, group))
    return model
