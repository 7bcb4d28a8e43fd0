"""Networks from images to embeddings."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..requirements import need
from .weights import load_weights

if TYPE_CHECKING:
    from ..config import ModelConfig

TIMM = "timm:"


class Output(NamedTuple):
    """The output of a network in training mode."""

    embedding: Tensor
    """`[n, D]`, before any normalisation: the input of the metric loss."""
    logits: Tensor | None
    """`[n, P]` for the identity loss; None without a classifier."""


class ReIDModel(nn.Module):
    """A backbone, then optionally a linear layer to the embedding, a neck and a classifier.

    It returns `Output` in training mode, and in evaluation mode the embedding `[n, D]` for retrieval, after the neck if
    there is one. The neck ("BNNeck") is a batch norm whose bias stays 0: the metric loss takes the embedding before it,
    the identity loss and retrieval the one after it.

    Args:
        backbone: images `[n, 3, H, W]` to features `[n, width]`.
        width: the number of features.
        num_identities: classes of the classifier; 0 for no classifier.
        neck: add the neck. It needs a classifier, since only the identity loss trains it.
        dim: embedding dimension D, by a linear layer; None: `width`.

    Raises:
        ValueError: a neck without a classifier, or a negative `num_identities`.

    Source of the neck: Luo, Gu, Liao, Lai and Jiang, "Bag of Tricks and A Strong Baseline for Deep Person
    Re-identification", arXiv 1903.07071.
    """

    def __init__(self, backbone: nn.Module, width: int, num_identities: int, *, neck: bool, dim: int | None) -> None:
        super().__init__()
        if num_identities < 0:
            raise ValueError(f"sn_ops.reid: model: num_identities: expected an int >= 0, got {num_identities}")
        if neck and num_identities == 0:
            raise ValueError(
                "sn_ops.reid: model: neck: expected num_identities > 0 with it, since only the identity loss trains "
                "the neck, got 0"
            )
        self.dim = width if dim is None else dim
        self.backbone = backbone
        self.projection: nn.Module = nn.Identity() if dim is None else nn.Linear(width, dim)
        self.neck: nn.Module = nn.Identity()
        self.classifier: nn.Module | None = None
        if neck:
            self.neck = nn.BatchNorm1d(self.dim)
            self.neck.bias.requires_grad_(False)
        if num_identities > 0:
            self.classifier = nn.Linear(self.dim, num_identities, bias=not neck)
            nn.init.normal_(self.classifier.weight, std=0.001)
            if not neck:
                nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Output | Tensor:
        embedding = self.projection(self.backbone(images))
        if not self.training:
            return self.neck(embedding)
        return Output(embedding, None if self.classifier is None else self.classifier(self.neck(embedding)))


# ---- backbones ----------------------------------------------------------------------------------


def _unit(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _unit(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, maps: Tensor) -> Tensor:
        return nn.functional.relu(maps + self.second(self.first(maps)))


class SmallNet(nn.Module):
    """A compact residual network for crops of about 128x64, which a CPU trains in minutes.

    Three halvings, then averages over horizontal stripes of the last maps, each a part of the body from head to feet,
    and a linear layer over all stripes: unlike a global average, this keeps where on the body a colour is. About 0.4
    million parameters. Convolutions run channels last.

    Shapes: `[n, 3, H, W]` to `[n, width]`, H at least 8 * stripes.

    Raises:
        ValueError: from forward, images too low for the stripes.
    """

    def __init__(self, width: int = 256, stripes: int = 6) -> None:
        super().__init__()
        self.stripes = stripes
        self.maps = nn.Sequential(
            _unit(3, 24, 2), _unit(24, 48, 2), _Residual(48), _unit(48, 96, 2), _Residual(96)
        )  # fmt: skip
        self.embed = nn.Linear(96 * stripes, width)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # it takes it by name

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images.contiguous(memory_format=torch.channels_last))
        height = maps.shape[2]
        if height < self.stripes:
            raise ValueError(
                f"sn_ops.reid: model: expected images of at least {8 * self.stripes} rows for {self.stripes} stripes, "
                f"got {images.shape[2]}"
            )
        # Means, not adaptive pooling: their backward is deterministic on a GPU too.
        edges = [height * stripe // self.stripes for stripe in range(self.stripes + 1)]
        rows = maps.mean(3)  # [n, C, height]
        parts = [rows[:, :, first:end].mean(2) for first, end in itertools.pairwise(edges)]
        return self.embed(torch.cat(parts, 1))


def _set_last_stride(network: nn.Module, stride: int) -> bool:
    """Sets the stride of a ResNet's last stage, without dilation; False if `network` is not one.

    Raises:
        ValueError: layers other than convolutions and average pools stride the stage.
    """
    stage = getattr(network, "layer4", None)
    if not isinstance(stage, nn.Sequential) or len(stage) == 0:
        return False
    leaves = {name: m for name, m in stage[0].named_modules() if not any(m.children())}
    strided = {name: m for name, m in leaves.items() if getattr(m, "stride", 1) in (2, (2, 2))}
    for name, module in strided.items():
        if isinstance(module, nn.Conv2d):
            module.stride = (stride, stride)
        elif isinstance(module, nn.AvgPool2d):  # of a shortcut, which pools its stride x stride pixels (ResNet-D)
            pool = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, stride, ceil_mode=module.ceil_mode)
            parent, _, child = name.rpartition(".")
            setattr(stage[0].get_submodule(parent), child, pool)
        else:
            raise ValueError(
                "sn_ops.reid: model.last_stride: expected convolutions and average pools with the stride of layer4, "
                f"got {type(module).__name__}"
            )
    return bool(strided)


def _resnet50(config: ModelConfig) -> tuple[nn.Module, int]:
    resnet = need("torchvision.models.resnet")
    source = config.weights
    if source == "imagenet":
        try:
            network = resnet.resnet50(weights=resnet.ResNet50_Weights.IMAGENET1K_V1)
        except (OSError, RuntimeError) as error:  # no network, a full disk, a download that arrived damaged
            raise OSError(
                "sn_ops.reid: model.weights: expected to download torchvision's ImageNet weights of ResNet50, got "
                f"{error}. Where there is no network, give model.weights the path of the downloaded file: "
                f"{resnet.ResNet50_Weights.IMAGENET1K_V1.url}"
            ) from error
    else:
        network = resnet.resnet50(weights=None)
    width: int = network.fc.in_features
    network.fc = nn.Identity()
    if not _set_last_stride(network, config.last_stride):
        raise RuntimeError("sn_ops.reid: model: expected strides in layer4 of torchvision's ResNet50, got none")
    return network, width


def _timm(config: ModelConfig, image_size: tuple[int, int] | None) -> tuple[nn.Module, int]:
    timm = need("timm")
    name = config.name[len(TIMM) :]
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.partition('.')[0][:6]}*")[:8])
        raise ValueError(
            f"sn_ops.reid: model.name: expected a model of timm {timm.__version__} after {TIMM!r}, got {name!r}"
            + (f" (there are {near}, ...)" if near else "")
        )
    try:
        network: Any = _made(name, config.weights == "imagenet", image_size)
    except OSError as error:
        raise OSError(
            f"sn_ops.reid: model.weights: expected to download timm's weights of {name!r}, got {error}. Where there is "
            "no network, give model.weights the path of the downloaded file"
        ) from error
    except _REFUSALS as error:
        size = "" if image_size is None else f" for images of {image_size[0]} x {image_size[1]} (height x width)"
        reason = str(error) or f"an {type(error).__name__} from it"
        raise ValueError(f"sn_ops.reid: model: expected to make timm's {name!r}{size}, got: {reason}") from error
    if config.last_stride != 2:  # 2 is timm's own
        _set_last_stride(network, config.last_stride)
    # The width after pooling: some networks of timm widen their maps after it.
    return network, int(getattr(network, "head_hidden_size", network.num_features))


# What timm's networks raise for options that they do not support.
_REFUSALS = (AssertionError, RuntimeError, TypeError, ValueError)


def _made(name: str, pretrained: bool, image_size: tuple[int, int] | None) -> nn.Module:
    """A network of timm, checked by a forward with an image of the size, if there is one.

    Many are made for one size (most transformers for 224 x 224) and take another as `img_size`. Others have no such
    parameter, or ignore it, and take images of any size.
    """
    timm = need("timm")
    random = torch.get_rng_state()
    sized = [] if image_size is None else [{"img_size": image_size}]
    for options in (*sized, {}):
        torch.set_rng_state(random)  # the parameters are the same at every attempt
        try:
            network: nn.Module = timm.create_model(
                name, pretrained=pretrained, num_classes=0, global_pool="avg", **options
            )
            if image_size is not None:
                with torch.no_grad():
                    network.eval()(torch.zeros(1, 3, *image_size))
            return network.train()
        except _REFUSALS:
            if not options:
                raise
    raise AssertionError("the loop ends with an attempt that returns or raises")


def build_model(config: ModelConfig, num_identities: int, *, image_size: tuple[int, int] | None = None) -> ReIDModel:
    """The network of a configuration, with parameters from PyTorch's global generator, which the caller seeds.

    Args:
        config: the section `model`. `name`: "resnet50" (torchvision's, global average pool, 2048 features), "small"
            (`SmallNet`), or "timm:" and a name of timm's, with its global average pool. `weights`: None, "imagenet"
            (torchvision's IMAGENET1K_V1, timm's default; none for "small"), or a file, see `models.load_weights`.
            `last_stride`: stride of the last stage, only of ResNets (torchvision's and those of timm with the same
            `layer4`). `neck`, `dim`: see `ReIDModel`.
        num_identities: classes for the identity loss; 0 without one: DistributedDataParallel refuses a classifier that
            gets no gradient.
        image_size: (height, width) of the images in pixels, for networks of timm that are made for one size; None:
            timm's own size. A saved network must be built with the size that it was saved with.

    Returns:
        The network, on the CPU, in training mode.

    Raises:
        ValueError: an unknown name, unknown weights or weights that do not fit, or a network of timm that cannot take
            images of that size.
        OSError: "imagenet" weights that cannot be downloaded, or a missing file.
        ImportError: torchvision or timm is missing.

    Source: the stride is that of Sun, Zheng, Yang, Tian and Wang, "Beyond Part Models", arXiv 1711.09349.
    """
    if config.name == "resnet50":
        backbone, width = _resnet50(config)
    elif config.name == "small":
        if config.weights == "imagenet":
            raise ValueError(
                'sn_ops.reid: model.weights: expected none or a file for "small", which has no ImageNet weights, got '
                '"imagenet"'
            )
        backbone, width = (network := SmallNet()), network.embed.out_features
    elif config.name.startswith(TIMM) and len(config.name) > len(TIMM):
        backbone, width = _timm(config, image_size)
    else:
        raise ValueError(
            f'sn_ops.reid: model.name: expected "resnet50", "small" or "{TIMM}<name>", got {config.name!r}'
        )
    if config.weights not in (None, "imagenet"):
        load_weights(backbone, config.weights)
    return ReIDModel(backbone, width, num_identities, neck=config.neck, dim=config.dim)
