"""CMC, mean average precision in both definitions, and mINP, from the ranks of the matches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .distances import Distances
from .matching import Protocol
from .ranking import CHUNK, match_ranks

AveragePrecision = Literal["standard", "market"]
Unmatched = Literal["skip", "zero"]


@dataclass(frozen=True)
class PerQuery:
    """The scores of each query, on the CPU; 0 for a query without a match."""

    matches: Tensor
    """int64 `[Q]`: G, the matches that the protocol keeps."""
    first_rank: Tensor
    """int64 `[Q]`: the rank of the first match, from 1; 0 where there is none."""
    average_precision: Tensor
    """float64 `[Q]`, standard definition."""
    average_precision_market: Tensor
    """float64 `[Q]`, the official Market-1501 code's definition."""
    inverse_negative_penalty: Tensor
    """float64 `[Q]`: G / r_G."""


@dataclass(frozen=True)
class Scores:
    """The scores of one evaluation, fractions of 1. `str()` names the definition that each number follows.

    Source: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015 (CMC, and mAP "market" in its
    code); Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", 2020 (mINP).
    """

    cmc: Tensor
    """float64 `[max_rank]` on the CPU: entry k - 1 is the fraction of queries with a match at rank <= k."""
    mAP_standard: float  # noqa: N815 - its usual name
    """Mean of `(1 / G) sum_k k / r_k`, with r_k the rank of the k-th of G matches."""
    mAP_market: float  # noqa: N815
    """Mean of `(1 / G) sum_k (k / r_k + (k - 1) / (r_k - 1)) / 2`, the second term 1 where r_k = 1."""
    mINP: float  # noqa: N815
    """Mean of `G / r_G`."""
    average_precision: AveragePrecision
    """Which of the two `mAP` is."""
    queries: int
    """How many queries the means are over."""
    skipped: int
    """Queries without a match, which the means leave out (`unmatched="skip"`)."""
    gallery: int
    """Gallery images, without junk."""
    per_query: PerQuery
    """The scores of each query, those left out of the means included."""

    @property
    def mAP(self) -> float:  # noqa: N802
        """The mean average precision by the definition `average_precision`, a fraction of 1."""
        return self.mAP_market if self.average_precision == "market" else self.mAP_standard

    @property
    def rank1(self) -> float:
        """CMC at rank 1, a fraction of 1."""
        return float(self.cmc[0])

    def as_dict(self) -> dict[str, float]:
        """Plain numbers for a log.

        Returns:
            "mAP_standard", "mAP_market", "mINP", "rank1", "rank5", "rank10", "rank20" (as far as the CMC goes),
            fractions of 1; "queries", "skipped", "gallery", counts.
        """
        ranks = {f"rank{k}": float(self.cmc[k - 1]) for k in (1, 5, 10, 20) if k <= len(self.cmc)}
        return {
            "mAP_standard": self.mAP_standard,
            "mAP_market": self.mAP_market,
            "mINP": self.mINP,
            **ranks,
            "queries": self.queries,
            "skipped": self.skipped,
            "gallery": self.gallery,
        }

    def __str__(self) -> str:
        values = self.as_dict()
        ranks = ", ".join(f"rank-{k[4:]} {100 * v:.2f} %" for k, v in values.items() if k.startswith("rank"))
        chosen, other = ("standard", "market") if self.average_precision == "standard" else ("market", "standard")
        return (
            f"mAP ({chosen}) {100 * self.mAP:.2f} %, mAP ({other}) {100 * values[f'mAP_{other}']:.2f} %, {ranks}, "
            f"mINP {100 * self.mINP:.2f} %; {self.queries} queries ({self.skipped} without a match skipped), "
            f"gallery {self.gallery}"
        )


def scores(
    distances: Distances,
    protocol: Protocol,
    max_rank: int = 50,
    average_precision: AveragePrecision = "standard",
    unmatched: Unmatched = "skip",
    *,
    stops: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> list[Scores]:
    """The scores for each prefix of the gallery (by default one: all of it).

    Args:
        distances: Q x G, as `ranking.match_ranks`.
        protocol: for the same Q and G.
        max_rank: length of the CMC. It has this length even where the gallery is shorter.
        average_precision: the definition of `Scores.mAP`; both are always computed.
        unmatched: a query without a match is left out ("skip", as torchreid and fast-reid do), or counts 0 in every
            score ("zero", as the official Market-1501 code does).
        stops: sizes of the prefixes, as `ranking.match_ranks`.
        chunk: about how many distances are held at a time.

    Returns:
        One `Scores` for each prefix.

    Raises:
        ValueError: an option out of range, no query that counts, or as `ranking.match_ranks`.
    """
    if max_rank < 1:
        raise ValueError(f"sn_ops.reid: max_rank: expected an int >= 1, got {max_rank}")
    for name, value, allowed in (
        ("average_precision", average_precision, get_args(AveragePrecision)),
        ("unmatched", unmatched, get_args(Unmatched)),
    ):
        if value not in allowed:
            raise ValueError(f"sn_ops.reid: {name}: expected one of {allowed}, got {value!r}")
    sizes = [distances.shape[1]] if stops is None else list(stops)
    parts: list[list[PerQuery]] = [[] for _ in sizes]
    for block in match_ranks(distances, protocol, stops=sizes, chunk=chunk):
        counts = block.counts.cpu()
        for part, ranks in zip(parts, block.ranks.cpu(), strict=True):
            part.append(_per_query(counts, ranks))
    if not parts[0] or (unmatched == "skip" and not any(bool(part.matches.any()) for part in parts[0])):
        raise ValueError(
            f"sn_ops.reid: query: expected at least one query with a match under another camera, "
            f"got none among {distances.shape[0]}"
        )
    result = []
    for size, part in zip(sizes, parts, strict=True):
        every = PerQuery(*(torch.cat(column) for column in zip(*(vars(p).values() for p in part), strict=True)))
        counted = every.matches > 0 if unmatched == "skip" else torch.ones_like(every.matches, dtype=torch.bool)
        queries = int(counted.sum())
        first = every.first_rank[counted & (every.first_rank > 0) & (every.first_rank <= max_rank)]
        result.append(
            Scores(
                cmc=(first - 1).bincount(minlength=max_rank).cumsum(0).double() / queries,
                mAP_standard=float(every.average_precision[counted].mean()),
                mAP_market=float(every.average_precision_market[counted].mean()),
                mINP=float(every.inverse_negative_penalty[counted].mean()),
                average_precision=average_precision,
                queries=queries,
                skipped=len(counted) - queries,
                gallery=int(size - (protocol.junk < size).sum()),
                per_query=every,
            )
        )
    return result


def _per_query(counts: Tensor, ranks: Tensor) -> PerQuery:
    """The scores of queries from the number `[c]` and the ranks `[c, P]` of their matches, on the CPU."""
    if ranks.shape[1] == 0:
        ranks = ranks.new_ones(len(ranks), 1)  # a column to reduce over; no query of the block has a match
    place = torch.arange(1, ranks.shape[1] + 1)
    is_match = place <= counts[:, None]
    rank = torch.where(is_match, ranks, 1).double()
    at = place / rank  # precision with the k-th match
    # Just before it k - 1 of r_k - 1 images are matches; before the first image the precision is defined as 1.
    before = torch.where(rank > 1, (place - 1) / (rank - 1).clamp(min=1), 1.0)
    some = counts.clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        # cumsum adds in order: the rounding of sum depends on P, and P on the other queries.
        return torch.where(is_match, values, 0.0).cumsum(1)[:, -1] / some

    return PerQuery(
        matches=counts,
        first_rank=rank[:, 0].long() * (counts > 0),
        average_precision=mean(at),
        average_precision_market=mean((at + before) / 2),
        inverse_negative_penalty=counts / torch.where(is_match, rank, 1.0).amax(1),
    )
