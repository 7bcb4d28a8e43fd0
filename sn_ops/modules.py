"""`SNLoss`, the loss as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .checks import check_options
from .dispatch import BACKEND_DEVICES
from .functional import ALPHA, WEIGHT, K, SNStats, sn_loss


class SNLoss(nn.Module):
    """The Support Neighbor loss as a module: `sn_loss` with its options kept. It has no parameters and no buffers.

    Args:
        k: size of the support set, an int >= 1.
        alpha: inverse temperature, in 1 / distance, a finite number > 0.
        weight: factor of the squeeze, a finite number >= 0.
        squeeze: "span", "support", "nearest" or "none", see `sn_loss`.
        reduction: "mean" over the valid anchors, "sum", or "none".
        backend: "auto" or a name in `backends()`.
        group: None, a `torch.distributed` process group, or `sn_ops.distributed.Exchange`, see `sn_loss`.
        return_stats: also return `SNStats`.

    Raises:
        TypeError: an option of the wrong type, at once.
        ValueError: an option with a value that is not allowed, at once.

    Example:
        ```python
        criterion = sn_ops.SNLoss(k=10, alpha=50.0, weight=0.1)
        loss = criterion(F.normalize(embeddings), identities)
        loss.backward()
        ```

    Source: see `sn_loss`.
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
        self.k, self.alpha, self.weight, _, _ = check_options(
            k, alpha, weight, squeeze, reduction, backend, BACKEND_DEVICES
        )
        self.backend = backend
        if group is not None:
            from .distributed.exchange import check_group

            check_group(group)
        self.squeeze = squeeze
        self.reduction = reduction
        self.group = group
        self.return_stats = return_stats

    def forward(
        self,
        feats: Tensor,
        labels: Tensor,
        candidates: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        self_index: int | Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, SNStats]:
        """The loss of a batch, see `sn_loss`.

        Args:
            feats: `[N, D]` embeddings of the anchors, float64, float32, float16 or bfloat16.
            labels: `[N]` identities, any integer dtype, on the device of feats.
            candidates: `[M, D]` embeddings in which neighbours are looked for; None: the anchors.
            candidate_labels: `[M]` identities of the candidates, given with candidates, and only then.
            self_index: which candidate an anchor is itself: None, an int or an integer tensor `[N]`.
            sizes: with group only: the rows of every rank, if they are known; may differ from call to call.

        Returns:
            The loss, 0-d (or `[N]`), float32, or float64 for float64 features; with return_stats (loss, `SNStats`).

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a wrong shape, device or value, or ranks whose options differ.
            RuntimeError: another rank of the group was given bad input.
        """
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
        """The options as text, for `repr`."""
        text = (
            f"k={self.k}, alpha={self.alpha}, weight={self.weight}, squeeze={self.squeeze!r}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
        if self.group is not None:
            text += f", group={self.group!r}"
        return text + ", return_stats=True" if self.return_stats else text
