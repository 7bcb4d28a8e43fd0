"""Batches of P identities with K images of each."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


def _count(name: str, value: int, least: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(
            f"sn_ops.reid: sampler: {name}: expected an int >= {least}, got {value!r} of type {type(value).__name__}"
        ) from None
    if count < least:
        raise ValueError(f"sn_ops.reid: sampler: {name}: expected an int >= {least}, got {count}")
    return count


class IdentitySampler(Sampler[list[int]]):
    """A batch sampler: each batch has up to P identities with K images of each, each identity is in one batch an epoch.

    An epoch of n identities has B = ceil(n / P) batches. Where P does not divide n the identities are spread evenly:
    batches have floor(n / B) or ceil(n / B) identities, the larger ones first. Nothing is padded, repeated or dropped,
    and no last batch has only a few identities, whose images would find few negatives.

    The K images of an identity are drawn without replacement. From an identity with fewer than K images all are drawn
    equally often, and the remainder at random.

    A batch lists its identities one after another, the K images of one together. With `world` processes, rank r has
    the identities from `m * r // world` to `m * (r + 1) // world` of a batch of m: the ranks' batches, concatenated in
    rank order, are the batch of one process with the same arguments.

    Args:
        labels: `[n]` the identity of each image of the data set.
        cameras: `[n]` the camera of each image.
        identities: P of the whole batch, over all ranks.
        images: K.
        seed: an int >= 0; with the number of the epoch it determines every batch.
        camera_balanced: spread the K images of an identity over its cameras: one image that has not been drawn from
            each camera in turn, in a random order, until there are K.
        rank: which process this is, from 0.
        world: how many processes there are.

    The state is (`epoch`, `start_batch`): `set_epoch(epoch, start_batch)` continues after that many of its batches.

    Raises:
        TypeError, ValueError: arguments of the wrong type or out of range, numbers of labels and cameras that differ,
            or a batch that would have fewer identities than there are ranks.

    Source: P x K batches are those of Hermans, Beyer and Leibe, "In Defense of the Triplet Loss for Person
    Re-Identification", arXiv 1703.07737; once an epoch, as the SN loss's authors do.
    """

    def __init__(
        self,
        labels: Sequence[int],
        cameras: Sequence[int],
        identities: int,
        images: int,
        *,
        seed: int,
        camera_balanced: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(labels) != len(cameras):
            raise ValueError(
                f"sn_ops.reid: sampler: cameras: expected {len(labels)} entries like labels, got {len(cameras)}"
            )
        if len(labels) == 0:
            raise ValueError("sn_ops.reid: sampler: labels: expected at least one image, got none")
        self.identities = _count("identities", identities, 1)
        self.images = _count("images", images, 1)
        self.seed = _count("seed", seed, 0)
        self.world = _count("world", world, 1)
        self.rank = _count("rank", rank, 0)
        if self.rank >= self.world:
            raise ValueError(f"sn_ops.reid: sampler: rank: expected less than world, which is {world}, got {rank}")
        self.camera_balanced = bool(camera_balanced)

        of_identity: dict[int, list[int]] = defaultdict(list)
        for index, label in enumerate(labels):
            of_identity[int(label)].append(index)
        # Sorted by label, so that the order in which identities appear does not matter.
        self._members = [np.array(of_identity[label]) for label in sorted(of_identity)]
        self._cameras = np.asarray([int(camera) for camera in cameras])

        total = len(self._members)
        self.batches = -(-total // self.identities)
        """Batches of a whole epoch."""
        smallest = total // self.batches
        if smallest < self.world:
            raise ValueError(
                f"sn_ops.reid: sampler: expected at least {self.world} identities in every batch, one for each rank, "
                f"got {smallest}: {total} identities in {self.batches} batches of up to {self.identities}"
            )
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Sets the epoch that iteration draws, from its batch `start_batch` on.

        Raises:
            TypeError, ValueError: not ints >= 0, or a `start_batch` beyond the epoch's end.
        """
        start_batch = _count("start_batch", start_batch, 0)
        if start_batch > self.batches:
            raise ValueError(
                f"sn_ops.reid: sampler: start_batch: expected at most {self.batches}, the batches of an epoch, "
                f"got {start_batch}"
            )
        self.epoch, self.start_batch = _count("epoch", epoch, 0), start_batch

    def __len__(self) -> int:
        """The number of batches that iteration yields."""
        return self.batches - self.start_batch

    def __iter__(self) -> Iterator[list[int]]:
        # The whole epoch is drawn on every rank, so that a batch depends neither on the rank nor on start_batch.
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self._members))
        draw = self._draw_balanced if self.camera_balanced else self._draw
        plan = [[draw(random, self._members[identity]) for identity in part] for part in self._parts(order)]
        for drawn in plan[self.start_batch :]:
            first, end = (len(drawn) * rank // self.world for rank in (self.rank, self.rank + 1))
            yield [int(index) for rows in drawn[first:end] for index in rows]

    def _parts(self, order: np.ndarray) -> list[np.ndarray]:
        """The identities of each batch; the larger batches first."""
        return np.array_split(order, self.batches)

    def _draw(self, random: np.random.Generator, members: np.ndarray) -> np.ndarray:
        """K of an identity's images."""
        rounds = [random.permutation(members) for _ in range(-(-self.images // len(members)))]
        return np.concatenate(rounds)[: self.images]

    def _draw_balanced(self, random: np.random.Generator, members: np.ndarray) -> np.ndarray:
        """K of an identity's images, camera after camera."""
        seen = self._cameras[members]
        drawn: list[np.ndarray] = []
        while sum(map(len, drawn)) < self.images:
            cameras = random.permutation(np.unique(seen))
            queues = [random.permutation(members[seen == camera]) for camera in cameras]
            # The first image of every camera, then the second of those that have one, and so on.
            turns = np.concatenate([np.arange(len(queue)) for queue in queues])
            drawn.append(np.concatenate(queues)[np.argsort(turns, kind="stable")])
        return np.concatenate(drawn)[: self.images]
