"""Retrieval scores: CMC, mean average precision in both definitions, mINP, multiple query, re-ranking, distractors.

`evaluate` takes features, `evaluate_matrix` a distance matrix. Both follow the protocol of Market-1501 (`Protocol`).
"""

from __future__ import annotations

from .distances import Distances, FeatureDistances, MatrixDistances
from .distractors import evaluate_with_distractors
from .lists import RankedLists, ranked_lists
from .matching import Protocol
from .metrics import PerQuery, Scores
from .multiquery import multi_query_features
from .rerank import ReRank, RerankedDistances
from .retrieval import distances_of, evaluate, evaluate_matrix

__all__ = [
    "Distances",
    "FeatureDistances",
    "MatrixDistances",
    "PerQuery",
    "Protocol",
    "RankedLists",
    "ReRank",
    "RerankedDistances",
    "Scores",
    "distances_of",
    "evaluate",
    "evaluate_matrix",
    "evaluate_with_distractors",
    "multi_query_features",
    "ranked_lists",
]
