"""sn_ops: the Support Neighbor loss for PyTorch.

Li, Ding, Li, Zhang and Fu, "Support Neighbor Loss for Person Re-Identification", ACM MM 2018, arXiv 1808.06030.
`sn_loss` and `SNLoss` compute it, `support_neighbors` shows its neighbours, `backends` says what runs it here.

Parts of their own: `sn_ops.distributed` (batches over many processes), `sn_ops.metric_learning` (the loss for
pytorch-metric-learning), `sn_ops.reid` (a trainer for person re-identification).

Layers, from the bottom up; a module imports from its own layer and from those before it: reference, triton, checks,
dispatch, ops, distributed, functional, modules, metric_learning, reid.
"""

from .dispatch import BackendInfo, backends, version
from .functional import SNStats, SupportNeighbors, sn_loss, support_neighbors
from .modules import SNLoss

__version__ = version()

__all__ = [
    "BackendInfo",
    "SNLoss",
    "SNStats",
    "SupportNeighbors",
    "__version__",
    "backends",
    "sn_loss",
    "support_neighbors",
]
