"""Large batches in chunks: the gradient of the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sn_ops.reid.training.gradcache import backward_in_chunks
from support.tiny_runs import Restless, one_thread


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def gradients_of(network: nn.Module, images: Tensor, chunks: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A loss that is no sum over chunks, and its gradients."""

    def loss_of(embedding: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        assert logits is not None
        near = torch.cdist(embedding, embedding + 0.1).min(1).values
        loss = near.logsumexp(0) + logits.softmax(1).square().mean()
        return loss, loss.detach()

    network.zero_grad()
    torch.manual_seed(seed)
    loss = backward_in_chunks(network, images, chunks, loss_of)
    return loss, [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("chunks", [2, 3, 7, 100])
def test_chunks_give_the_gradient_of_the_whole(chunks: int) -> None:
    torch.manual_seed(0)
    network = Restless(5, norm=False, dropout=0.0).double().train()
    images = torch.randn(10, 3, 48, 24, dtype=torch.float64)
    loss, wanted = gradients_of(network, images, 1)
    chunked, found = gradients_of(network, images, chunks)
    torch.testing.assert_close(chunked, loss, rtol=1e-6, atol=0)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)  # embeddings are collected in single precision


def test_chunks_repeat_random_numbers_and_statistics() -> None:
    """With dropout and batch norm: the gradients of the chunks' own forward, and one update of the statistics each."""
    torch.manual_seed(0)
    network = Restless(5).train()
    images = torch.randn(8, 3, 48, 24)
    norm = network.body[1]
    assert isinstance(norm, nn.BatchNorm2d)
    seen: list[Tensor] = []
    handle = network.body.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    gradients_of(network, images, 2)
    handle.remove()
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 2 and norm.track_running_stats
    after = torch.rand(3)
    torch.manual_seed(0)
    network(images[:4]), network(images[4:])
    assert torch.equal(torch.rand(3), after)  # generators are as one pass leaves them
