"""Use of a trained network: embeddings, scores, ranked lists, export."""

from __future__ import annotations

from .embed import Embedded, Embeddings, embed_images, image_files, load_embeddings, save_embeddings
from .onnx import check_onnx, export_onnx
from .rank import Ranked, rank_images
from .scoring import evaluate_model
from .trained import Trained, open_trained

__all__ = [
    "Embedded",
    "Embeddings",
    "Ranked",
    "Trained",
    "check_onnx",
    "embed_images",
    "evaluate_model",
    "export_onnx",
    "image_files",
    "load_embeddings",
    "open_trained",
    "rank_images",
    "save_embeddings",
]
