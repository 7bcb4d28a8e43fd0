"""Batches larger than memory: the loss sees all embeddings of a batch, the network one chunk of its images at a time.

The sum of gradients over small batches is not the gradient of a large batch, since neighbours come from the whole
batch. So a batch goes through the network twice: first in chunks without a graph, for the embeddings, whose loss gives
the gradient of each; then in chunks with a graph, each of which gets the gradients of its embeddings. This takes the
memory of one chunk, and the time of one more forward.

The second forward repeats the first: random generators (dropout, drop path) are reset to their state at each chunk.
Batch norm in training mode takes the statistics of the *chunk* in both passes, so that with batch norm the result
depends on the number of chunks, as it does on the number of GPUs; running statistics are updated only in the second
pass, once a chunk. Without batch norm the gradients are those of the whole batch, up to rounding.

Source: Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup" (GradCache), arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Result = TypeVar("Result")
Outputs = tuple[Tensor, Tensor | None]
"""Embeddings float32 `[n, D]` and logits float32 `[n, P]`, or None without a classifier."""


def backward_in_chunks(
    network: nn.Module,
    images: Tensor,
    chunks: int,
    loss_of: Callable[[Tensor, Tensor | None], tuple[Tensor, Result]],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Result:
    """Adds the gradients of a batch's loss to those of the network's parameters.

    Args:
        network: maps `[n, 3, H, W]` to an output with `embedding` and `logits`; a DistributedDataParallel averages
            once, at the last chunk.
        images: `[N, 3, H, W]`.
        chunks: the number of chunks; 1 is the ordinary way.
        loss_of: from all embeddings and logits to the scalar to differentiate, and a result.
        autocast: a context for the network's forward.

    Returns:
        The result of `loss_of`.
    """
    chunks = min(chunks, len(images))
    if chunks <= 1:
        loss, result = loss_of(*_forward(network, images, autocast))
        loss.backward()
        return result

    parts = images.tensor_split(chunks)
    states, seen = [], []
    with torch.no_grad(), _statistics_untouched(network):
        for part in parts:
            states.append(_generators(images.device))
            seen.append(_forward(network, part, autocast))
    embedding = torch.cat([first for first, _ in seen]).requires_grad_()
    classified = [logits for _, logits in seen if logits is not None]
    logits = torch.cat(classified).requires_grad_() if classified else None
    loss, result = loss_of(embedding, logits)
    loss.backward()

    collected = [tensor for tensor in (embedding, logits) if tensor is not None]
    gradients = [_gradient(tensor).tensor_split(chunks) for tensor in collected]
    with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
        for i, part in enumerate(parts):
            _set_generators(states[i], images.device)
            with _averaging(network, last=i == chunks - 1):
                outputs = [tensor for tensor in _forward(network, part, autocast) if tensor is not None]
                torch.autograd.backward(outputs, [gradient[i] for gradient in gradients])
    return result


def _forward(network: nn.Module, images: Tensor, autocast: Callable[[], AbstractContextManager[Any]]) -> Outputs:
    # Single precision from here on: with alpha = 50 a loss of half-precision distances has few correct digits.
    with autocast():
        output = network(images)
    return output.embedding.float(), None if output.logits is None else output.logits.float()


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _averaging(network: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    if last or not isinstance(network, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return network.no_sync()


@contextmanager
def _statistics_untouched(network: nn.Module) -> Iterator[None]:
    """Batch norm in training mode normalises as always, but does not update its running statistics."""
    norms = [module for module in network.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    norms = [module for module in norms if module.training]
    try:
        for module in norms:
            module.track_running_stats = False
        yield
    finally:
        for module in norms:
            module.track_running_stats = True


def _generators(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_generators(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
