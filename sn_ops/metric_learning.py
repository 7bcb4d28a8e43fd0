"""The Support Neighbor loss for `pytorch-metric-learning` (PML), as one of that library's losses.

In a script that uses PML one line changes:

    loss_func = sn_ops.metric_learning.SNLoss()  # was: losses.TripletMarginLoss()

Trainers, testers, reducers, regularizers, `ref_emb` and `DistributedLossWrapper` work as before. PML's
`CrossBatchMemory` accepts losses by the names of their classes and does not know this one: use this module's subclass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_options
from .dispatch import BACKEND_DEVICES
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


__all__ = ["CrossBatchMemory", "OwnRows", "SNLoss"]


class OwnRows(NamedTuple):
    """An `indices_tuple` that says only which reference row each anchor is itself: `SNLoss` needs no list of pairs."""

    rows: Tensor
    """int64 `[N]`: which row of ref_emb an anchor is, -1 for none."""


class SNLoss(BaseMetricLossFunction):
    """`sn_ops.sn_loss` as a loss of pytorch-metric-learning: element losses, one for each valid anchor.

    With PML's default reducer, the mean, the value is `sn_ops.sn_loss(normalize(embeddings), labels)`.

    Call it with embeddings `[N, D]`, labels `[N]` and optionally ref_emb `[M, D]` and ref_labels `[M]`, in which
    neighbours are then looked for. The loss chooses its own pairs, so `indices_tuple` can say one thing only: which
    reference row an anchor is itself. It is `OwnRows`, or what PML makes of it: all pairs (a1, p, a2, n) but for the
    positive pair of an anchor and itself.

    Args:
        k: size of the support set, an int >= 1.
        alpha: inverse temperature, in 1 / distance, a finite number > 0.
        weight: factor of the squeeze, a finite number >= 0.
        squeeze: "span", "support", "nearest" or "none", see `sn_ops.sn_loss`.
        backend: "auto" or a name in `sn_ops.backends()`.
        **kwargs: arguments of `BaseMetricLossFunction`: distance (an `LpDistance` with p=2 and power=1, the default;
            it says whether embeddings are normalised), reducer, embedding_regularizer, collect_stats and others. With
            `collect_stats=True` the entries of `SNStats` are attributes, which PML's loggers record.

    Raises:
        TypeError: an option of the wrong type; when called, an input of the wrong type or dtype.
        ValueError: an option or input that is not allowed, another distance, missing labels, or an indices_tuple that
            selects pairs, such as a miner's.

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
        self.k, self.alpha, self.weight, _, _ = check_options(
            k, alpha, weight, squeeze, "none", backend, BACKEND_DEVICES
        )
        self.backend = backend
        self.squeeze = squeeze
        distance = self.distance
        if not isinstance(distance, LpDistance) or distance.p != 2 or distance.power != 1:
            raise ValueError(f"sn_ops: distance: expected an LpDistance with p=2 and power=1, got {distance!r}")
        self.add_to_recordable_attributes(list_of_names=["k", "alpha", "weight"], is_stat=False)
        self.add_to_recordable_attributes(list_of_names=list(SNStats._fields), is_stat=True)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """PML's hook: the losses of the valid anchors, and which anchors these are.

        Args:
            embeddings: `[N, D]` rows of the anchors, floating.
            labels: `[N]` identities, integer.
            indices_tuple: None, `OwnRows`, or pairs that name every anchor's own row.
            ref_emb: `[M, D]` rows in which neighbours are looked for; the tensor embeddings itself if none were given.
            ref_labels: `[M]` identities, integer.

        Returns:
            PML's loss dictionary: the element losses of the valid anchors and their indices.

        Raises:
            TypeError: a tensor of the wrong dtype.
            ValueError: missing labels, wrong shapes, or an indices_tuple that selects pairs.
        """
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

    `diagonal`: the rows where they are known, as without ref_emb.
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
    """PML's `CrossBatchMemory` for the losses it knows and for this module's `SNLoss`.

    With `SNLoss` it tells the loss where the batch lies in the queue, wrapped around or not, in place of listing all
    pairs of the batch and the memory. Arguments, shapes and errors are those of
    `pytorch_metric_learning.losses.CrossBatchMemory`.
    """

    @staticmethod
    def supported_losses() -> list[str]:
        """The names of the classes of losses that are accepted.

        Returns:
            PML's names and "SNLoss".
        """
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
        """PML's hook: what the loss is told about pairs of the batch and the memory.

        Args:
            embeddings: `[N, D]` the batch.
            labels: `[N]` its identities.
            E_mem: `[M, D]` the rows of the memory.
            L_mem: `[M]` their identities.
            input_indices_tuple: what the caller of the memory passed, or None.
            do_remove_self_comparisons: whether the batch is in the memory, so that each anchor meets itself there.

        Returns:
            `OwnRows` or None for `SNLoss` without a miner, else PML's pairs.
        """
        if not isinstance(self.loss, SNLoss) or self.miner is not None or input_indices_tuple is not None:
            return super().create_indices_tuple(
                embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
            )
        return OwnRows(self.curr_batch_idx) if do_remove_self_comparisons else None
