"""What the ranks of a process group compute together, with gradients for DistributedDataParallel, which averages."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def global_mean(values: Tensor, valid: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """The mean over all ranks of the values that are valid, and their number.

    Args:
        values: floating `[n]` or of any shape; n may differ between ranks.
        valid: bool, the shape of `values`.
        group: the process group; None for one process.

    Returns:
        The mean, 0-d, 0 if no value is valid; and the number of valid values, int64 0-d. A rank's gradient is world
        size times its part of the mean's gradient, which the average of DistributedDataParallel divides out.
    """
    total, count = values.masked_fill(~valid, 0).sum(), valid.sum()
    if group is None:
        return total / count.clamp(min=1), count
    sums = torch.stack([total.detach().double(), count.double()])
    dist.all_reduce(sums, group=group)
    many = sums[1].clamp(min=1)
    share = total * (dist.get_world_size(group) / many).to(total.dtype)
    mean = (sums[0] / many).to(total.dtype)
    # The value of the global mean with the gradient of this rank's share. Share + (mean - share) would round.
    return share - share.detach() + mean, sums[1].long()
