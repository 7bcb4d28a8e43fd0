"""The Support Neighbor loss for `pytorch-metric-learning` (PML): a loss of that library's kind.

In a script that uses PML one line changes::

    loss_func = sn_ops.metric_learning.SNLoss()  # was: losses.TripletMarginLoss()

and trainers, testers, reducers, regularizers, `ref_emb`, and `DistributedLossWrapper` go on working. `CrossBatchMemory`
accepts losses by the names of their classes and does not know this one: take the subclass in this module, which does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_options
from .dispatch import check_backend
from .functional import ALPHA, WEIGHT, K, SNStats, sn_loss

try:
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from pytorch_metric_learning.losses import CrossBatchMemory as _CrossBatchMemory
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"sn_ops.metric_learning needs pytorch-metric-learning, which is not here ({error}): "
        "pip install pytorch-metric-learning",
        name=error.name,
    ) from error


class OwnRows(NamedTuple):
    """An `indices_tuple` that says only which reference row each anchor is itself: `SNLoss` needs no list of pairs."""

    rows: Tensor
    """int64 `[N]`: which row of ref_emb an anchor is, -1 for none."""


class SNLoss(BaseMetricLossFunction):
    """`sn_ops.sn_loss` as a loss of pytorch-metric-learning: element losses, one for each valid anchor.

    With PML's default reducer, the mean, the value is `sn_ops.sn_loss(normalize(embeddings), labels)`.

    Args:
        k, alpha, weight, squeeze, backend: as in `sn_ops.sn_loss`.
        **kwargs: of `BaseMetricLossFunction`: distance (an `LpDistance` of p = 2 and power 1, which is the default; it
            says whether embeddings are normalised), reducer, embedding_regularizer, collect_stats, ... With
            `collect_stats=True` the entries of `SNStats` are attributes that PML's loggers record.

    Called with embeddings `[N, D]`, labels `[N]` and optionally ref_emb `[M, D]`, ref_labels `[M]` to look for
    neighbours in. The loss chooses its own pairs, so that `indices_tuple` can say one thing only: which reference row
    an anchor is itself. Either `OwnRows`, or what PML makes of it: all pairs (a1, p, a2, n), but for the positive pair
    of an anchor and itself.

    Raises:
        TypeError, ValueError: for a bad option or input as `sn_ops.sn_loss`, for another distance, for missing labels,
            and for an indices_tuple that selects pairs, such as a miner's.

    Source: see `sn_ops.sn_loss`.
    """

    def __init__(
        self,
        *,
        k: int = K,
        alpha: float = ALPHA,
        weight: float = WEIGHT,
        squeeze: str = "span",
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.backend = check_backend(backend)
        self.k, self.alpha, self.weight, _, _ = check_options(k, alpha, weight, squeeze, "none")
        self.squeeze = squeeze
        distance = self.distance
        if not isinstance(distance, LpDistance) or distance.p != 2 or distance.power != 1:
            raise ValueError(f"sn_ops: distance: expected an LpDistance with p=2 and power=1, got {distance!r}")
        self.add_to_recordable_attributes(list_of_names=["k", "alpha", "weight"], is_stat=False)
        self.add_to_recordable_attributes(list_of_names=list(SNStats._fields), is_stat=True)

    def compute_loss(
        self,
        embeddings: Tensor,  # [N, D]
        labels: Tensor | None,  # [N]
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,  # [M, D], the very tensor embeddings if no other was given
        ref_labels: Tensor | None,  # [M]
    ) -> dict[str, dict[str, Any]]:
        """PML's hook: the losses of valid anchors and which anchors these are."""
        if labels is None or ref_labels is None:
            missing = "labels" if labels is None else "ref_labels"
            raise ValueError(f"sn_ops: {missing}: expected an integer tensor, got None")
        symmetric = ref_emb is embeddings
        if symmetric:
            own = torch.arange(len(labels), device=labels.device)
        else:
            own = torch.full_like(labels, -1, dtype=torch.int64)
        if indices_tuple is not None:
            own = _own_rows(indices_tuple, labels, ref_labels, own if symmetric else None)

        anchors = self.distance.maybe_normalize(embeddings)
        candidates: dict[str, Any] = {}
        if not symmetric:
            candidates["candidates"] = self.distance.maybe_normalize(ref_emb)
            candidates["candidate_labels"], candidates["self_index"] = ref_labels, own
        losses, stats = sn_loss(
            anchors, labels, **candidates, k=self.k, alpha=self.alpha, weight=self.weight, squeeze=self.squeeze,
            reduction="none", backend=self.backend, return_stats=True,
        )  # fmt: skip
        if self.collect_stats:
            for name, value in zip(stats._fields, stats, strict=True):
                setattr(self, name, value.item())

        (valid,) = torch.where(_has_positive(labels, ref_labels, own))
        if len(valid) == 0:
            return self.zero_losses()
        return {"loss": {"losses": losses[valid], "indices": valid, "reduction_type": "element"}}


def _has_positive(labels: Tensor, ref_labels: Tensor, own: Tensor) -> Tensor:
    """bool `[N]`: another reference row than its own has the anchor's label."""
    order = ref_labels.sort().values
    label = labels.to(order.dtype)
    same = torch.searchsorted(order, label, right=True) - torch.searchsorted(order, label)
    if len(ref_labels) == 0:
        return same > 0
    itself = (own >= 0) & (ref_labels[own.clamp(min=0)] == labels)
    return same > itself.long()


def _own_rows(indices_tuple: tuple[Tensor, ...], labels: Tensor, ref_labels: Tensor, diagonal: Tensor | None) -> Tensor:
    """int64 `[N]`: the reference row that an anchor is itself, -1 for none, from an `indices_tuple`.

    `diagonal`: what it is known to be, if it is.
    """
    if isinstance(indices_tuple, OwnRows):
        return indices_tuple.rows if diagonal is None else diagonal
    if len(indices_tuple) != 4:
        raise ValueError(
            "sn_ops: indices_tuple: expected None, OwnRows or pairs (a1, p, a2, n), got a tuple of "
            f"{len(indices_tuple)}: the loss chooses its own neighbours and takes no triplets"
        )
    first, positives, second, negatives = indices_tuple
    same = labels[:, None] == ref_labels
    unlisted, different = same.clone(), ~same
    unlisted[first, positives] = False
    different[second, negatives] = False
    if diagonal is not None:
        unlisted.fill_diagonal_(False)
    own = unlisted.int().argmax(1) if len(ref_labels) > 0 else torch.zeros_like(labels, dtype=torch.int64)
    count = unlisted.sum(1)
    most = 1 if diagonal is None else 0
    if bool((count > most).any() | different.any()):
        raise ValueError(
            "sn_ops: indices_tuple: expected all pairs, but for those of an anchor and itself, got a selection: the "
            "loss chooses its own neighbours and works without a miner"
        )
    return torch.where(count == 1, own, -1) if diagonal is None else diagonal


class CrossBatchMemory(_CrossBatchMemory):
    """PML's `CrossBatchMemory`, which takes this module's `SNLoss` too, and PML's own losses as ever.

    With `SNLoss` it tells the loss where the batch lies in the queue, wrapped around or not, in place of listing all
    pairs of the batch and the memory.

    Args, shapes, errors: as in `pytorch_metric_learning.losses.CrossBatchMemory`.
    """

    @staticmethod
    def supported_losses() -> list[str]:
        """The class names that are accepted."""
        return [*_CrossBatchMemory.supported_losses(), SNLoss.__name__]

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: tuple[Tensor, ...] | None,
        do_remove_self_comparisons: bool,
    ) -> tuple[Tensor, ...] | None:
        """PML's hook: what the loss is told about pairs of the batch and the memory."""
        if not isinstance(self.loss, SNLoss) or self.miner is not None or input_indices_tuple is not None:
            return super().create_indices_tuple(
                embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
            )
        return OwnRows(self.curr_batch_idx) if do_remove_self_comparisons else None
