"""The memory of embeddings from earlier batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sn_ops.reid.losses import Memory


def test_memory_wraps_and_leaves_out_the_batch() -> None:
    memory = Memory(5)
    assert memory.candidates(torch.tensor([0])) is None

    def rows(*images: int) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.tensor(images)
        return index[:, None].float().expand(-1, 2), index * 10, index

    memory.push(*rows(1, 2, 3))
    memory.push(*rows(4, 5, 6))
    found = memory.candidates(torch.tensor([5, 9]))
    assert found is not None
    assert found[0][:, 0].tolist() == [6, 2, 3, 4] and found[1].tolist() == [60, 20, 30, 40]  # 1 is overwritten
    assert memory.candidates(torch.tensor([2, 3, 4, 5, 6])) is None
    memory.push(*rows(*range(10, 20)))
    found = memory.candidates(torch.tensor([0]))
    assert found is not None and sorted(found[0][:, 0].tolist()) == [15, 16, 17, 18, 19]
    again = Memory(5)
    again.load_state_dict(memory.state_dict(), torch.device("cpu"))
    copy = again.candidates(torch.tensor([0]))
    assert copy is not None and torch.equal(copy[0], found[0])
    with pytest.raises(ValueError, match="at least 1 row"):
        Memory(0)
