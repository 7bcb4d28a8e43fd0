"""Cross-batch memory: embeddings of earlier batches as further candidates of the metric term."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Memory:
    """A queue of the last `rows` embeddings, without gradients.

    Candidates are the batch, with gradients as without a memory, then the queue. With a process group every rank holds
    the same queue, that of all ranks' batches, so that the loss is that of one process. Embeddings of images in the
    present batch are left out: an image's earlier embedding would be its nearest positive, and teach nothing.

    Args:
        rows: the length of the queue, >= 1.

    Source: Wang, Zhang, Huang and Scott, "Cross-Batch Memory for Embedding Learning", arXiv 1912.06798.
    """

    def __init__(self, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"sn_ops.reid: memory: expected at least 1 row, got {rows}")
        self.rows = rows
        self.head = 0  # where the next row goes
        self.stored = 0
        self._feats: Tensor | None = None  # [rows, D]
        self._labels = torch.empty(0, dtype=torch.int64)
        self._images = torch.empty(0, dtype=torch.int64)

    def candidates(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Embeddings `[M, D]` and labels `[M]` of other images; None if there are none.

        Args:
            images: int64, indices in the data set of all images of the batch, over all ranks.
        """
        if self._feats is None:
            return None
        # Copies: `push` overwrites rows, maybe while this batch's graph is alive.
        keep = ~torch.isin(self._images[: self.stored], images)
        feats, labels = self._feats[: self.stored][keep], self._labels[: self.stored][keep]
        return (feats, labels) if len(feats) > 0 else None

    def push(self, feats: Tensor, labels: Tensor, images: Tensor) -> None:
        """Adds a batch in place of the oldest rows.

        Args:
            feats: `[n, D]`, the embeddings that the metric term got, of all ranks in rank order.
            labels: int64 `[n]`.
            images: int64 `[n]`, indices in the data set.
        """
        feats, labels, images = (tensor.detach()[-self.rows :] for tensor in (feats, labels, images))
        if self._feats is None:
            self._feats = feats.new_zeros(self.rows, feats.shape[1])
            self._labels, self._images = labels.new_zeros(self.rows), images.new_zeros(self.rows)
        slots = (self.head + torch.arange(len(feats), device=feats.device)) % self.rows
        self._feats[slots], self._labels[slots], self._images[slots] = feats, labels, images
        self.head = (self.head + len(feats)) % self.rows
        self.stored = min(self.stored + len(feats), self.rows)

    def state_dict(self) -> dict[str, Any]:
        """The queue, for a checkpoint."""
        return {
            "head": self.head,
            "stored": self.stored,
            "feats": self._feats,
            "labels": self._labels,
            "images": self._images,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Loads the queue of a checkpoint to a device.

        Raises:
            ValueError: a queue of another length, or a position outside it.
            KeyError: a missing part.
        """
        head, stored, feats = int(state["head"]), int(state["stored"]), state["feats"]
        rows = 0 if feats is None else self.rows
        lengths = [0 if feats is None else len(feats), len(state["labels"]), len(state["images"])]
        if lengths != [rows] * 3 or not 0 <= head < self.rows or not 0 <= stored <= rows:
            raise ValueError(
                f"sn_ops.reid: memory: expected a queue of {self.rows} rows, got {lengths[0]} with {lengths[1]} labels "
                f"and {lengths[2]} images, {stored} of them in use, the next at {head}"
            )
        self.head, self.stored = head, stored
        self._feats = None if feats is None else feats.to(device)
        self._labels, self._images = state["labels"].to(device), state["images"].to(device)
