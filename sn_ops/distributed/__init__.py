"""The loss over the batches of all ranks of a process group: `sn_loss(..., group=...)`.

The definition: N_r anchors on rank r, and as candidates the batches of all ranks in rank order, M = sum of all N_r.
What one process that holds the concatenated batch computes, every rank computes for its own anchors; means and
statistics are over the valid anchors of all ranks. A bank (`candidates=`) is the rank's own and stands behind the
gathered rows.

Two ways lead there, and they select the same neighbours, bit for bit:

gather  one collective brings all rows, labels packed behind each, to every rank, which calls the ordinary operator with
        separate candidates; backward, one reduce-scatter takes the candidates' gradients home. Memory O(M D) a rank.
ring    the batches travel round the ring of ranks one after the other. Each is searched as it passes, and what was
        found is merged by (squared distance, index), which is exact because the order of the candidates of an anchor
        is a total one. Backward the batches travel again, their gradients behind them. Memory O(N D) a rank.

Collectives, in this order: terms (skipped with `sizes=`), rows (gather or ring), totals; backward one reduce-scatter
(or the ring). Every rank takes part in each: a rank without anchors too, and a rank whose features need no gradient
gets a loss that requires one if another rank's do, so that its backward() serves the others.

Gradient convention: a rank's feature gradient is world size times that of the one process, given the same upstream
gradient on every rank. DistributedDataParallel averages over ranks, which makes its parameter gradients exactly those
of the one process. Who sums gradients instead divides the loss by the world size.
"""

from .exchange import Exchange
from .gather import all_gather_rows

__all__ = ["Exchange", "all_gather_rows"]
