"""The loss over the batches of all ranks of a process group, `sn_loss(..., group=...)`, and a gather for other losses.

The definition: rank r has N_r anchors; the candidates are the batches of all ranks in rank order, M = sum of all N_r.
Every rank computes for its own anchors what one process with the concatenated batch computes for them. Means and
statistics are over the valid anchors of all ranks. A bank (`candidates=`) is the rank's own and stands behind the
gathered rows.

There are two ways, and both select the same neighbours, bit for bit:

- gather: one collective brings all rows, each with its label, to every rank, which calls the ordinary operator with
  separate candidates. In backward one reduce-scatter returns the candidates' gradients to their owners. Memory O(M D)
  on a rank.
- ring: the batches travel from rank to rank. Each is searched as it passes, and what was found is merged by (squared
  distance, index). That is exact, because the order of an anchor's candidates is total. In backward the batches travel
  again, their gradients behind them. Memory O(N D) on a rank.

The collectives are, in this order: terms (skipped with `sizes=`), rows (gather or ring), totals; in backward one
reduce-scatter (or the ring). Every rank takes part in each, also a rank without anchors. A rank whose features need no
gradient gets a loss that requires one if another rank's do, so its backward() serves the others.

Gradients: a rank's feature gradient is world size times that of the one process, given the same upstream gradient on
every rank. DistributedDataParallel averages over ranks, which makes its parameter gradients exactly those of the one
process. Code that sums gradients instead divides the loss by the world size.

Modules: `loss` is the loss and its gradients, `search` the neighbours of one rank's anchors, `agreement` what ranks
agree on first, `rows` the form in which rows travel, `collectives` the communication, `exchange` the types that these
share, and `gather` the public `all_gather_rows`.
"""

from .exchange import Exchange
from .gather import all_gather_rows

__all__ = ["Exchange", "all_gather_rows"]
