"""`SNLoss`, the loss as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .checks import check_options
from .dispatch import check_backend
from .functional import ALPHA, WEIGHT, K, SNStats, sn_loss


class SNLoss(nn.Module):
    """The Support Neighbor loss as a module: `sn_loss` with its options kept. It has no parameters and no buffers.

    Args:
        k, alpha, weight, squeeze, reduction, backend, group, return_stats: as in `sn_loss`.

    Raises:
        TypeError, ValueError: for a bad option, at once.

    Shapes and source: see `sn_loss`.

    Example::

        criterion = sn_ops.SNLoss(k=10, alpha=50.0, weight=0.1)
        loss = criterion(F.normalize(embeddings), identities)
        loss.backward()
    """

    def __init__(
        self,
        *,
        k: int = K,
        alpha: float = ALPHA,
        weight: float = WEIGHT,
        squeeze: str = "span",
        reduction: str = "mean",
        backend: str = "auto",
        group: Any = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        self.backend = check_backend(backend)
        self.k, self.alpha, self.weight, _, _ = check_options(k, alpha, weight, squeeze, reduction)
        if group is not None:
            from .distributed.exchange import check_group

            check_group(group)
        self.squeeze = squeeze
        self.reduction = reduction
        self.group = group
        self.return_stats = return_stats

    def forward(
        self,
        feats: Tensor,  # [N, D]
        labels: Tensor,  # [N]
        candidates: Tensor | None = None,  # [M, D]
        candidate_labels: Tensor | None = None,  # [M]
        self_index: int | Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, SNStats]:
        """The loss, or (loss, `SNStats`) with return_stats: arguments, results and errors of `sn_loss`; `sizes` may
        differ from call to call, as batches do."""
        return sn_loss(
            feats,
            labels,
            k=self.k,
            alpha=self.alpha,
            weight=self.weight,
            squeeze=self.squeeze,
            candidates=candidates,
            candidate_labels=candidate_labels,
            self_index=self_index,
            reduction=self.reduction,
            backend=self.backend,
            group=self.group,
            sizes=sizes,
            return_stats=self.return_stats,
        )

    def extra_repr(self) -> str:
        text = (
            f"k={self.k}, alpha={self.alpha}, weight={self.weight}, squeeze={self.squeeze!r}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
        if self.group is not None:
            text += f", group={self.group!r}"
        return text + ", return_stats=True" if self.return_stats else text
