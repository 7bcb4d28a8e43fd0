"""From images to batches: reading, transforms, repeatable augmentation."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..requirements import need
from .images import read_image
from .records import Sample
from .sampler import IdentitySampler

if TYPE_CHECKING:
    from ..config import DataConfig

Transform = Callable[[Any], Tensor]
"""From a `PIL.Image.Image` in RGB to a float32 tensor `[3, H, W]`."""

Item = tuple[Tensor, int, int, int]
"""Image float32 `[3, H, W]`, label, camera, index in the data set."""

# Of ImageNet's images in RGB from 0 to 1, as the pretrained networks of torchvision and timm expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def _resized(config: DataConfig) -> list[Any]:
    v2 = need("torchvision.transforms.v2")
    size = (config.height, config.width)
    return [v2.PILToTensor(), v2.Resize(size, interpolation=v2.InterpolationMode.BILINEAR, antialias=True)]


def _standardised() -> list[Any]:
    v2 = need("torchvision.transforms.v2")
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))]


def eval_transform(config: DataConfig) -> Transform:
    """Resize to `config.height` x `config.width` (bilinear, antialiased), ImageNet mean and standard deviation.

    Raises:
        ImportError: torchvision is missing.
    """
    return need("torchvision.transforms.v2").Compose(_resized(config) + _standardised())


def train_transform(config: DataConfig) -> Transform:
    """As `eval_transform`, with the augmentation that `config` asks for.

    `pad` pixels of black on every side and a random crop of the size; a horizontal flip with probability `flip`; with
    probability `erase` a random rectangle of the mean colour, of 2 to 40 % of the image, its sides' ratio 0.3 to 3.33.
    Random numbers are those of PyTorch's global generator on the CPU, which `ReIDImages` seeds for each image.

    Raises:
        ImportError: torchvision is missing.

    Source of the erasing: Zhong, Zheng, Kang, Li and Yang, "Random Erasing Data Augmentation", arXiv 1708.04896.
    """
    v2 = need("torchvision.transforms.v2")
    steps = _resized(config)
    if config.pad > 0:
        steps.append(v2.RandomCrop((config.height, config.width), padding=config.pad))
    if config.flip > 0:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    steps += _standardised()
    if config.erase > 0:  # after standardisation, where 0 is the mean colour
        steps.append(v2.RandomErasing(config.erase, scale=(0.02, 0.4), ratio=(0.3, 1 / 0.3), value=0.0))
    return v2.Compose(steps)


class ReIDImages(Dataset[Item]):
    """The images of a list of samples.

    An item is (image float32 `[3, H, W]`, label, camera, index). A random transform depends on (`seed`, epoch, index)
    and, in a batch that has the image several times, on which of them it is: neither on the number of workers nor on
    items read before. The generators of the process do not change.

    Args:
        samples: the images to read.
        transform: from a PIL image in RGB to a tensor, with random numbers from PyTorch's global generator on the CPU.
        identities: pid -> label, such as `Split.identities()`; None: the label is the pid.
        seed: an int >= 0.

    Raises:
        ValueError: a sample whose pid `identities` does not have, or a negative seed.
        UnreadableImageError: from an item or a loader with any number of workers, if a file is missing or not an image,
            an OSError; the message has its path.
        ImportError: from an item, if pillow is missing.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Transform,
        identities: Mapping[int, int] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        if seed < 0:
            raise ValueError(f"sn_ops.reid: images: seed: expected an int >= 0, got {seed}")
        if identities is not None:
            unknown = next((sample for sample in samples if sample.pid not in identities), None)
            if unknown is not None:
                raise ValueError(
                    f"sn_ops.reid: images: expected a pid among the {len(identities)} identities, "
                    f"got {unknown.pid} of {unknown.path}"
                )
        self.samples = tuple(samples)
        self.transform = transform
        self.seed = seed
        self.labels = [sample.pid if identities is None else identities[sample.pid] for sample in samples]
        self.cameras = [sample.camera for sample in samples]
        # In shared memory, since workers live for several epochs.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch, on which random transforms depend."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, in running workers too. Call it before iterating over a loader."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        return self._item(int(index), 0)

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The items of a batch: a DataLoader calls this."""
        times: dict[int, int] = {}
        items = []
        for index in map(int, indices):
            times[index] = times.get(index, -1) + 1
            items.append(self._item(index, times[index]))
        return items

    def _item(self, index: int, time: int) -> Item:
        picture = read_image(self.samples[index].path)
        (seed,) = np.random.SeedSequence((self.seed, self.epoch, index, time)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would also seed this process's GPUs.
            torch.default_generator.manual_seed(int(seed))
            tensor = self.transform(picture)
        return tensor, self.labels[index], self.cameras[index], index


def outlive_stop_signals(worker: int) -> None:
    """Makes a process that reads images survive the signals that stop a run: `worker_init_fn` of its loaders.

    Schedulers and terminals send these signals to all processes of a run. The worker must still deliver its batch, and
    its death would be reported as an error. It ends with the run's process, or at a second SIGTERM, which that sends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def make_loader(
    images: ReIDImages,
    *,
    sampler: IdentitySampler | None = None,
    batch_size: int = 64,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Item]:
    """A loader of batches: images float32 `[n, 3, H, W]`, labels, cameras and indices int64 `[n]`.

    It draws no random number from the generators of the process, so a resumed run need not restore any for it.

    Args:
        images: the images to read.
        sampler: of batches; None: all images in order.
        batch_size: images in a batch, without a sampler; the last batch may have fewer.
        workers: processes that read; 0 reads in this one. They live as long as the loader.
        pin_memory: batches in page-locked memory, for transfers to a GPU.

    Raises:
        ValueError: a `batch_size` or `workers` that PyTorch refuses.
    """
    options: dict[str, Any] = {"batch_size": batch_size} if sampler is None else {"batch_sampler": sampler}
    return DataLoader(
        images,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        **options,
    )
