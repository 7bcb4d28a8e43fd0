"""sn_ops: the Support Neighbor loss for PyTorch.

Li, Ding, Li, Zhang and Fu, "Support Neighbor Loss for Person Re-Identification", ACM MM 2018, arXiv 1808.06030.
`sn_loss` and `SNLoss` compute it, `support_neighbors` shows its neighbours, `backends` says what runs it here.
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
