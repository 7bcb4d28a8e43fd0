"""The losses of the trainer: the metric terms, and the identity loss.

Every loss takes `group`, a `torch.distributed` process group, as `sn_ops.sn_loss` does. Each rank passes its own batch,
of any size; the value is that of one process with all batches. A rank's gradients are world size times those of that
process, so that the average of DistributedDataParallel gives them. All ranks must call the loss, and either all or none
of them backward().
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sn_ops
from sn_ops.distributed import all_gather_rows

from ..ddp import global_mean
from .base import Bank, MetricLoss, Stats, distances, pairs_of

if TYPE_CHECKING:
    from ..config import LossConfig


class SNMetric(MetricLoss):
    """`sn_ops.sn_loss`.

    Args:
        alpha, k, weight, backend: as in `sn_ops.sn_loss`.
        squeeze: a reading of the squeeze that `sn_ops.sn_loss` has, or "pair", the distance `|| x_near - x_far ||`
            between an anchor's nearest and farthest positive, which the paper's abstract can also mean.
        normalize: as in `MetricLoss`.

    Statistics: those of `sn_ops.SNStats`.

    Raises:
        TypeError, ValueError: as `sn_ops.sn_loss`; when called, for "pair" with a group and a self_index at once.
    """

    def __init__(
        self,
        *,
        alpha: float = 50.0,
        k: int = 10,
        weight: float = 0.1,
        squeeze: str = "span",
        backend: str = "auto",
        normalize: bool = True,
    ) -> None:
        super().__init__(normalize)
        self.squeeze, self.weight = squeeze, weight
        self.options: dict[str, Any] = {
            "alpha": alpha,
            "k": k,
            "weight": weight,
            "squeeze": "none" if squeeze == "pair" else squeeze,
            "backend": backend,
        }
        sn_ops.SNLoss(**self.options)  # raises for wrong options

    def compute(self, feats: Tensor, labels: Tensor, bank: Bank | None, group: Any) -> tuple[Tensor, Stats]:
        given: dict[str, Any] = {}
        if bank is not None:
            given = {"candidates": bank.feats, "candidate_labels": bank.labels, "self_index": bank.self_index}
        loss, stats = sn_ops.sn_loss(feats, labels, **self.options, **given, group=group, return_stats=True)
        if self.squeeze == "pair":
            loss = loss + self.weight * self._pair(feats, labels, bank, group)
        return loss, dict(stats._asdict())

    def _pair(self, feats: Tensor, labels: Tensor, bank: Bank | None, group: Any) -> Tensor:
        """The mean of `|| x_near - x_far ||` over valid anchors."""
        rows, rows_labels, own = (None, None, None) if bank is None else bank
        if group is not None:
            if own is not None:
                raise ValueError(
                    'sn_ops.reid: loss: self_index: expected None with a group and squeeze "pair", which leaves out '
                    "one row an anchor, got one"
                )
            batch, own = all_gather_rows(feats, group)
            batch_labels, _ = all_gather_rows(labels, group)
            rows = batch if rows is None else torch.cat([batch, rows])
            rows_labels = batch_labels if rows_labels is None else torch.cat([batch_labels, rows_labels])
        found = sn_ops.support_neighbors(
            feats.detach(), labels, candidates=None if rows is None else rows.detach(), candidate_labels=rows_labels,
            self_index=own, k=1, backend=self.options["backend"],
        )  # fmt: skip
        rows = feats if rows is None else rows
        near, far = found.nearest_positive, found.farthest_positive
        if len(rows) == 0:
            return global_mean(feats.sum(1) * 0, near >= 0, group)[0]
        # An anchor without a positive gets row 0 twice, and the mean leaves it out.
        return global_mean(distances(rows[near.clamp(min=0)], rows[far.clamp(min=0)]), near >= 0, group)[0]


class TripletMetric(MetricLoss):
    """The triplet loss with the hardest positive and the hardest negative of each anchor ("batch hard").

    `max(0, margin + d(i, farthest positive) - d(i, nearest negative))`, or with margin None the soft margin
    `log(1 + exp(d(i, farthest positive) - d(i, nearest negative)))`, over anchors that have both.

    Args:
        margin: >= 0, or None.
        normalize: as in `MetricLoss`.

    Statistics: "valid_anchors"; "positive_distance", "negative_distance", means of the two distances; "violations", the
    fraction of anchors whose hardest negative is not farther than their hardest positive.

    Source: Hermans, Beyer and Leibe, "In Defense of the Triplet Loss for Person Re-Identification", arXiv 1703.07737.
    """

    def __init__(self, margin: float | None = 0.3, *, normalize: bool = True) -> None:
        super().__init__(normalize)
        if margin is not None and not 0 <= margin < float("inf"):
            raise ValueError(f"sn_ops.reid: loss: margin: expected a finite number >= 0 or None, got {margin!r}")
        self.margin = margin

    def compute(self, feats: Tensor, labels: Tensor, bank: Bank | None, group: Any) -> tuple[Tensor, Stats]:
        pairs = pairs_of(feats, labels, bank, group)
        valid = pairs.positive.any(1) & pairs.negative.any(1)
        if pairs.positive.shape[1] == 0:
            far = near = feats.new_zeros(len(feats)) + feats.sum() * 0
        else:
            with torch.no_grad():
                squared = torch.cdist(feats, pairs.candidates, compute_mode="donot_use_mm_for_euclid_dist")
                farthest = squared.masked_fill(~pairs.positive, -1).argmax(1)
                nearest = squared.masked_fill(~pairs.negative, float("inf")).argmin(1)
            far = distances(feats, pairs.candidates[farthest])
            near = distances(feats, pairs.candidates[nearest])
        gap = far - near
        losses = F.softplus(gap) if self.margin is None else F.relu(gap + self.margin)
        loss, count = global_mean(losses, valid, group)
        with torch.no_grad():
            return loss, {
                "valid_anchors": count,
                "positive_distance": global_mean(far, valid, group)[0],
                "negative_distance": global_mean(near, valid, group)[0],
                "violations": global_mean((gap >= 0).to(far.dtype), valid, group)[0],
            }


class SupConMetric(MetricLoss):
    """The supervised contrastive loss, in the form that averages outside of the logarithm (L_out, equation 2).

    `-mean over positives p of log( exp(x_i . x_p / temperature) / sum over a != i of exp(x_i . x_a / temperature) )`,
    over anchors that have a positive. (The authors' code multiplies by temperature / base_temperature, 1 as published.)

    Args:
        temperature: > 0.
        normalize: as in `MetricLoss`.

    Statistics: "valid_anchors"; "positive_similarity", "negative_similarity", means of x_i . x_j over the pairs of
    valid anchors.

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362.
    """

    def __init__(self, temperature: float = 0.1, *, normalize: bool = True) -> None:
        super().__init__(normalize)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"sn_ops.reid: loss: temperature: expected a finite number > 0, got {temperature!r}")
        self.temperature = temperature

    def compute(self, feats: Tensor, labels: Tensor, bank: Bank | None, group: Any) -> tuple[Tensor, Stats]:
        pairs = pairs_of(feats, labels, bank, group)
        similarity = feats @ pairs.candidates.T
        others = pairs.positive | pairs.negative
        # -inf for an anchor without others, which does not count.
        log_sum = (similarity / self.temperature).masked_fill(~others, float("-inf")).logsumexp(1)
        positives = pairs.positive.sum(1)
        attracted = (similarity / self.temperature).masked_fill(~pairs.positive, 0).sum(1) / positives.clamp(min=1)
        valid = positives > 0
        loss, count = global_mean(log_sum - attracted, valid, group)
        with torch.no_grad():
            rows = valid[:, None]
            return loss, {
                "valid_anchors": count,
                "positive_similarity": global_mean(similarity, pairs.positive & rows, group)[0],
                "negative_similarity": global_mean(similarity, pairs.negative & rows, group)[0],
            }


class NoMetric(MetricLoss):
    """No metric term: 0 with zero gradients; NaN for non-finite embeddings, so that training notices them."""

    def compute(self, feats: Tensor, labels: Tensor, bank: Bank | None, group: Any) -> tuple[Tensor, Stats]:
        none = torch.zeros(len(feats), dtype=torch.bool, device=feats.device)
        _, count = global_mean(feats.detach().sum(1), none, group)
        return (feats * 0).sum(), {"valid_anchors": count}


# ---- the identity loss --------------------------------------------------------------------------


class IdentityLoss(nn.Module):
    """Cross-entropy over the training identities, with label smoothing.

    It takes logits `[n, P]`, labels int64 `[n]` and optionally `group`, see the module, and returns (loss, statistics):
    the mean over images, 0-d float32 (float64 for float64 logits), and "accuracy".

    Args:
        smoothing: the share of the target that is spread evenly over all P identities, 0 <= smoothing < 1.

    Source of the smoothing: Szegedy, Vanhoucke, Ioffe, Shlens and Wojna, "Rethinking the Inception Architecture for
    Computer Vision", arXiv 1512.00567; in re-identification: Luo et al., arXiv 1903.07071 (0.1).
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"sn_ops.reid: loss: label_smoothing: expected from 0 to below 1, got {smoothing!r}")
        self.smoothing = smoothing

    def forward(self, logits: Tensor, labels: Tensor, *, group: Any = None) -> tuple[Tensor, Stats]:
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits if logits.dtype is torch.float64 else logits.float()
            losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
        every = torch.ones_like(labels, dtype=torch.bool)
        loss, _ = global_mean(losses, every, group)
        with torch.no_grad():
            right = (logits.argmax(1) == labels).to(losses.dtype)
            return loss, {"accuracy": global_mean(right, every, group)[0]}


class Losses(NamedTuple):
    """The terms of a configuration, without their factors `metric_weight` and `identity`."""

    metric: MetricLoss
    identity: IdentityLoss | None
    """None where its factor is 0."""


def build_losses(config: LossConfig) -> Losses:
    """The losses of a configuration.

    Raises:
        TypeError, ValueError: an unknown metric, or an option that the loss refuses.
    """
    metric: MetricLoss
    if config.metric == "sn":
        metric = SNMetric(
            alpha=config.alpha, k=config.k, weight=config.weight, squeeze=config.squeeze, backend=config.backend,
            normalize=config.normalize,
        )  # fmt: skip
    elif config.metric == "triplet":
        metric = TripletMetric(config.margin, normalize=config.normalize)
    elif config.metric == "supcon":
        metric = SupConMetric(config.temperature, normalize=config.normalize)
    elif config.metric == "none":
        metric = NoMetric(config.normalize)
    else:
        raise ValueError(
            f'sn_ops.reid: loss.metric: expected "sn", "triplet", "supcon" or "none", got {config.metric!r}'
        )
    return Losses(metric, IdentityLoss(config.label_smoothing) if config.identity > 0 else None)
