"""Networks: strides, neck, weights from files, batch norm across ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sn_ops.reid.config import LossConfig, ModelConfig
from sn_ops.reid.ddp import GroupBatchNorm, sync_batchnorm
from sn_ops.reid.losses import build_losses
from sn_ops.reid.models import Output, SmallNet, build_model, load_weights
from sn_ops.reid.requirements import need
from support import reid_on_ranks
from support.ranks import Ranks
from support.tiny_runs import one_thread

RESNET = ModelConfig(name="resnet50")
TIMM = ModelConfig(name="timm:resnet18")
SMALL = SmallNet()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def resnet_state() -> dict[str, Tensor]:
    """A state as torchvision's download has it, classifier included, with random values."""
    resnet: nn.Module = need("torchvision.models").resnet50(weights=None)
    return resnet.state_dict()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = float((found.detach().double() - expected.detach().double()).norm())
    assert error <= tolerance * float(expected.detach().double().norm()) + 1e-12, error


def last_maps(network: nn.Module, images: Tensor) -> Tensor:
    """The last stage's feature maps."""
    seen: list[Tensor] = []
    handle = network.get_submodule("layer4").register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    network(images)
    handle.remove()
    return seen[0]


# ---- backbones --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "shape"), [(1, (8, 4)), (2, (4, 2))])
def test_resnet50(stride: int, shape: tuple[int, int]) -> None:
    model = build_model(ModelConfig(name="resnet50", last_stride=stride), 0).eval()
    images = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        maps = last_maps(model.backbone, images)
        assert maps.shape == (2, 2048, *shape)
        out = model(images)
        assert out.shape == (2, 2048) and model.dim == 2048
        close(out, maps.sum((2, 3)) / (shape[0] * shape[1]))
    strides = {name: m.stride for name, m in model.backbone.named_modules() if isinstance(m, nn.Conv2d)}
    assert strides["layer4.0.conv2"] == strides["layer4.0.downsample.0"] == (stride, stride)
    assert strides["layer3.0.conv2"] == (2, 2) and strides["layer4.0.conv1"] == (1, 1)
    assert all(m.dilation == (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d))


def test_resnet50_is_torchvisions_but_for_the_stride(resnet_state: dict[str, Tensor]) -> None:
    backbone = build_model(RESNET, 7).backbone.state_dict()
    assert {name: t.shape for name, t in backbone.items()} == {
        name: t.shape for name, t in resnet_state.items() if not name.startswith("fc.")
    }


@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])  # the second one pools in its shortcuts
@pytest.mark.parametrize(("stride", "height"), [(1, 4), (2, 2)])
def test_timm(name: str, stride: int, height: int) -> None:
    model = build_model(ModelConfig(name=f"timm:{name}", last_stride=stride), 5).eval()
    images = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        maps = last_maps(model.backbone, images)
        assert maps.shape[2] == height
        close(model(images), maps.mean((2, 3)))
    assert model.dim == 512


def test_timm_without_that_stage() -> None:
    model = build_model(ModelConfig(name="timm:mobilenetv3_small_050"), 0)
    output = model(torch.randn(2, 3, 64, 32))
    assert output.embedding.shape == (2, model.dim)


@pytest.mark.parametrize(
    ("name", "takes_another"),
    [
        ("vit_tiny_patch16_224", False), ("mixer_s16_224", False), ("levit_128s", False), ("resnet18", True),
        ("crossvit_tiny_240", True),  # has img_size, and computes wrongly with one that is not square
    ],
)  # fmt: skip
def test_timm_is_made_for_the_size_of_the_images(name: str, takes_another: bool) -> None:
    """Most transformers take images of one size only, 224 x 224 where nothing else is said."""
    config = ModelConfig(name=f"timm:{name}")
    model = build_model(config, 3, image_size=(64, 32))
    assert all(module.training for module in model.modules())
    assert model(torch.randn(2, 3, 64, 32)).embedding.shape == (2, model.dim)
    without = build_model(config, 3).eval()
    if takes_another:
        assert without(torch.randn(2, 3, 64, 32)).shape == (2, model.dim)
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            without(torch.randn(2, 3, 64, 32))
    # A network is the same every time, so that a checkpoint fits.
    again = build_model(config, 3, image_size=(64, 32))
    again.load_state_dict(model.state_dict())


def test_trying_a_size_changes_no_parameter() -> None:
    torch.manual_seed(5)
    expected = build_model(TIMM, 3).state_dict()
    torch.manual_seed(5)
    found = build_model(TIMM, 3, image_size=(64, 32)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convit_tiny", r"Input height \(64\) doesn't match model \(224\)"),  # takes squares alone
        ("halonet26t", "an AssertionError from it"),
        ("inception_v3", "Kernel size can't be greater than actual input size"),
        ("pit_ti_224", "Only token pooling"),
    ],
)
def test_timm_cannot_take_images_of_the_size(name: str, reason: str) -> None:
    message = rf"model: expected to make timm's '{name}' for images of 64 x 32 \(height x width\), got: .*{reason}"
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig(name=f"timm:{name}"), 0, image_size=(64, 32))


def test_timm_cannot_make_it_at_all() -> None:
    with pytest.raises(ValueError, match="model: expected to make timm's 'pit_ti_224', got: Only token pooling"):
        build_model(ModelConfig(name="timm:pit_ti_224"), 0)


def test_refuses_a_stride_it_cannot_set() -> None:
    with pytest.raises(ValueError, match=r"last_stride: expected convolutions and average pools .* got BlurPool2d"):
        build_model(ModelConfig(name="timm:resnetblur18"), 0)


def test_small_keeps_what_is_where() -> None:
    """Upper and lower clothes exchanged are another person: a global average would not tell them apart."""
    network = SmallNet().eval()
    assert 3e5 < sum(parameter.numel() for parameter in network.parameters()) < 1e6
    top, bottom = torch.full((3, 64, 64), -1.0), torch.full((3, 64, 64), 1.0)
    one, other = torch.cat([top, bottom], 1), torch.cat([bottom, top], 1)
    with torch.no_grad():
        a, b, again = network(torch.stack([one, other, one]))
        assert float((a - b).norm()) > 0.05 * float(a.norm())
        close(again, a)
        for size in ((128, 64), (96, 40), (256, 128)):
            assert network(torch.randn(2, 3, *size)).shape == (2, 256)


def test_small_stripes_are_means_of_rows() -> None:
    network = SmallNet(width=24, stripes=3).eval()
    images = torch.randn(2, 3, 80, 24)  # 10 rows of maps: stripes of 3, 3 and 4
    with torch.no_grad():
        maps = network.maps(images)
        stripes = [maps[:, :, rows].flatten(2).mean(2) for rows in (slice(0, 3), slice(3, 6), slice(6, 10))]
        close(network(images), network.embed(torch.cat(stripes, 1)))
    with pytest.raises(ValueError, match="expected images of at least 24 rows for 3 stripes, got 16"):
        network(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("config", [ModelConfig(), TIMM], ids=lambda config: config.name)
def test_repeats_bit_for_bit(config: ModelConfig) -> None:
    images, labels = torch.randn(8, 3, 64, 32), torch.arange(8) // 2

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = build_model(config, 4)
        output = model(images)
        losses = build_losses(LossConfig(identity=1.0))
        assert losses.identity is not None
        (losses.metric(output.embedding, labels)[0] + losses.identity(output.logits, labels)[0]).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    first, second = gradients(), gradients()
    assert len(first) == len(list(build_model(config, 4).named_parameters()))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_small_learns() -> None:
    """Eight people in plain clothes, told apart after a few steps whatever the noise."""
    generator = torch.Generator().manual_seed(1)
    clothes = torch.rand(8, 3, 2, generator=generator) * 2 - 1
    model = build_model(ModelConfig(), 0)
    metric = build_losses(LossConfig()).metric
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    labels = torch.arange(32) // 4

    def batch() -> Tensor:
        images = clothes[labels].repeat_interleave(32, 2)[..., None].expand(-1, -1, -1, 32)
        return images + 0.5 * torch.randn(32, 3, 64, 32, generator=generator)

    for _ in range(15):
        optimizer.zero_grad()
        metric(model(batch()).embedding, labels)[0].backward()
        optimizer.step()
    with torch.no_grad():
        _, stats = metric(model(batch()).embedding, labels)
    assert float(stats["nearest_is_positive"]) > 0.9


# ---- neck and classifier ----------------------------------------------------------------------------


def test_neck() -> None:
    model = build_model(ModelConfig(neck=True, dim=16), 5)
    neck, classifier = model.neck, model.classifier
    assert isinstance(neck, nn.BatchNorm1d) and isinstance(classifier, nn.Linear)
    assert not neck.bias.requires_grad and neck.weight.requires_grad and classifier.bias is None
    nn.init.uniform_(neck.weight, 0.5, 2.0)
    images = torch.randn(9, 3, 64, 32)
    output = model(images)
    assert isinstance(output, Output) and output.logits is not None
    embedding = output.embedding
    # Before the neck: not standardised; the classifier sees it standardised over the batch.
    close(embedding, model.projection(model.backbone(images)))
    standard = (embedding - embedding.mean(0)) / (embedding.var(0, unbiased=False) + 1e-5).sqrt() * neck.weight
    close(output.logits, standard @ classifier.weight.T, 1e-4)
    output.logits.square().sum().backward()
    assert neck.bias.grad is None and neck.weight.grad is not None
    model.eval()
    with torch.no_grad():
        before = model.projection(model.backbone(images))
        assert neck.running_mean is not None and neck.running_var is not None
        after = (before - neck.running_mean) / (neck.running_var + 1e-5).sqrt() * neck.weight
        found = model(images)
        assert isinstance(found, Tensor)
        close(found, after)


def test_without_a_neck() -> None:
    model = build_model(ModelConfig(), 5)
    images = torch.randn(4, 3, 64, 32)
    output = model(images)
    assert isinstance(model.classifier, nn.Linear) and output.logits is not None
    close(output.logits, output.embedding @ model.classifier.weight.T + model.classifier.bias)
    model.eval()
    close(model(images), model.backbone(images))


def test_without_a_classifier() -> None:
    """Every parameter has a gradient from the metric loss: DistributedDataParallel wants that."""
    model = build_model(ModelConfig(dim=32), 0)
    output = model(torch.randn(4, 3, 64, 32))
    assert output.logits is None and output.embedding.shape == (4, 32)
    output.embedding.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- weights ----------------------------------------------------------------------------------------


def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 1 if tensor.is_floating_point() else tensor + 3 for name, tensor in state.items()}


@pytest.mark.parametrize("form", ["plain", "wrapped", "nested", "trainer", "old"])
def test_weights_from_a_file(tmp_path: Path, resnet_state: dict[str, Tensor], form: str) -> None:
    wanted = changed(resnet_state)
    content: Any = dict(wanted)
    if form == "wrapped":
        content = {"state_dict": {f"module.{name}": tensor for name, tensor in wanted.items()}, "epoch": 3}
    elif form == "nested":
        content = {"model": wanted}
    elif form == "trainer":
        own = {f"backbone.{name}": tensor for name, tensor in wanted.items() if not name.startswith("fc.")}
        content = {"model": {**own, "neck.weight": torch.ones(3), "classifier.weight": torch.ones(3)}, "epoch": 1}
    elif form == "old":
        content = {name: tensor for name, tensor in wanted.items() if not name.endswith("num_batches_tracked")}
    file = tmp_path / "weights.pth"
    torch.save(content, file)
    found = build_model(ModelConfig(name="resnet50", weights=str(file)), 4).backbone.state_dict()
    for name, tensor in found.items():
        if not (form == "old" and name.endswith("num_batches_tracked")):
            assert torch.equal(tensor, wanted[name]), name


def test_a_backbone_may_have_a_head_itself(tmp_path: Path) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.ModuleDict({"norm": nn.LayerNorm(3)})

    backbone = Headed()
    state = {**changed(backbone.state_dict()), "head.fc.weight": torch.ones(9, 3)}
    torch.save(state, tmp_path / "weights.pth")
    load_weights(backbone, tmp_path / "weights.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())


def test_imagenet_weights(tmp_path: Path, resnet_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that torchvision downloads, where it is there already."""
    (tmp_path / "checkpoints").mkdir()
    wanted = changed(resnet_state)
    torch.save(wanted, tmp_path / "checkpoints" / "resnet50-0676ba61.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = build_model(ModelConfig(name="resnet50", weights="imagenet"), 0).backbone.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_imagenet_weights_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    with pytest.raises(OSError, match=r"expected to download .* no route to host.* path of the downloaded file: http"):
        build_model(ModelConfig(name="resnet50", weights="imagenet"), 0)


class _Intruder:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("intruder"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a file of tensors that torch.save wrote"),
        (b"no tensors at all, but text", "expected a file of tensors that torch.save wrote"),
        (_Intruder(), "expected a file of tensors that torch.save wrote"),
        ([1, 2], "expected parameters by name"),
        ({"epoch": 3}, "expected parameters by name"),
        ({"fc.weight": torch.ones(2)}, "expected parameters by name"),
    ],
)
def test_refuses_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=message) as caught:
        build_model(ModelConfig(weights=str(file)), 0)
    assert str(file) in str(caught.value) and not (tmp_path / "intruder").exists()


def test_refuses_a_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(SmallNet().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"expected a file of tensors that torch\.save wrote"):
        load_weights(SmallNet(), file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_refuses_files_of_any_bytes(tmp_path: Path) -> None:
    """Random bytes, and bytes that the unpickler takes for instructions: always our error."""
    file = tmp_path / "weights.pth"
    generator = np.random.default_rng(0)
    contents = [b"\x80\x02.", b"\x80\x020.", b"J\x00", b"M", b"(", b"a.", b"\x80\x02]a.", b"\x80\x02}(K\x01u."]
    contents += [generator.bytes(int(generator.integers(1, 12))) for _ in range(400)]
    contents += [b"\x80\x02" + generator.bytes(int(generator.integers(1, 12))) for _ in range(400)]
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"^sn_ops\.reid: model\.weights: expected ") as caught:
            load_weights(SMALL, file)
        assert str(file) in str(caught.value)


def test_refuses_weights_of_another_network(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    state = SmallNet().state_dict()
    state["embed.weight"] = torch.ones(2, 3)
    state["extra"] = state.pop("embed.bias")
    torch.save(state, file)
    network = SmallNet()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    message = re.escape(
        f"expected the {len(before)} tensors of SmallNet in {file}, got 1 missing: embed.bias; 1 unknown: extra; "
        "1 of another shape: embed.weight [2, 3] for [256, 576]"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(network, file)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("config", "identities", "error", "message"),
    [
        (
            ModelConfig(name="resnet51"),
            1,
            ValueError,
            'expected "resnet50", "small" or "timm:<name>", got \'resnet51\'',
        ),
        (ModelConfig(name="timm:"), 1, ValueError, "model.name: expected"),
        (ModelConfig(name="timm:resnet_1"), 1, ValueError, r"expected a model of timm .*'resnet_1' \(there are "),
        (ModelConfig(weights="imagenet"), 1, ValueError, 'for "small", which has no ImageNet weights'),
        (ModelConfig(weights="/nowhere/x.pth"), 1, FileNotFoundError, "or a file, got /nowhere/x.pth"),
        (ModelConfig(neck=True), 0, ValueError, "neck: expected num_identities > 0"),
        (ModelConfig(), -1, ValueError, "num_identities: expected an int >= 0, got -1"),
    ],
)
def test_refuses(config: ModelConfig, identities: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_model(config, identities)


# ---- several ranks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (5, 7), (4, 0, 8)])
@pytest.mark.parametrize("kind", ["1d", "2d", "cumulative", "plain"])
def test_batch_norm_of_ranks(ranks: Ranks, kind: str, sizes: tuple[int, ...]) -> None:
    kinds: dict[str, nn.BatchNorm1d | nn.BatchNorm2d] = {
        "1d": nn.BatchNorm1d(3),
        "2d": nn.BatchNorm2d(3, momentum=0.3),
        "cumulative": nn.BatchNorm1d(3, momentum=None),
        "plain": nn.BatchNorm2d(3, affine=False, track_running_stats=False),
    }
    norm = kinds[kind].double()
    if kind != "plain":
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    shape = (12, 3) if kind in ("1d", "cumulative") else (12, 3, 5, 2)
    values = (10 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    results = ranks.run(
        range(len(sizes)),
        reid_on_ranks.batch_norm,
        norm,
        values.detach().split(list(sizes)),
        upstream.split(list(sizes)),
    )
    expected = norm(values)
    (gradient,) = torch.autograd.grad(expected, values, upstream)
    close(torch.cat([result[0] for result in results]), expected, 1e-10)
    close(torch.cat([result[1] for result in results]), gradient, 1e-9)
    for _, _, state in results:
        assert state.keys() == {f"0.{name}" for name in norm.state_dict()}
        for name, tensor in norm.state_dict().items():
            close(state[f"0.{name}"], tensor, 1e-10)


def test_batch_norm_of_ranks_in_half_precision(ranks: Ranks) -> None:
    """Its sums are in float32: 1300 rows cannot even be counted in bfloat16."""
    norm = nn.BatchNorm1d(3)
    values, upstream = (20 + torch.randn(1300, 3)).bfloat16(), torch.randn(1300, 3).bfloat16()
    results = ranks.run(range(2), reid_on_ranks.batch_norm, norm, values.split([700, 600]), upstream.split([700, 600]))
    norm(values.float())
    x = values.float().requires_grad_()
    expected = nn.functional.batch_norm(x, None, None, training=True)
    (gradient,) = torch.autograd.grad(expected, x, upstream.float())
    assert all(result[0].dtype is result[1].dtype is torch.bfloat16 for result in results)
    close(torch.cat([result[0] for result in results]), expected, 4e-3)
    close(torch.cat([result[1] for result in results]), gradient, 4e-3)
    assert isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor)
    for _, _, state in results:
        close(state["0.running_mean"], norm.running_mean, 1e-5)
        close(state["0.running_var"], norm.running_var, 1e-4)


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (4, 8)])
def test_a_step_of_ranks_is_that_of_one_process(ranks: Ranks, sizes: tuple[int, ...]) -> None:
    """Network, neck, batch norms, both losses, under DistributedDataParallel."""
    config = LossConfig(alpha=8.0, k=5, identity=1.0)
    images, labels = torch.randn(12, 3, 64, 32, dtype=torch.float64), torch.arange(12) // 3
    model = build_model(ModelConfig(neck=True, dim=24), 4).double()
    shards = list(zip(images.split(list(sizes)), labels.split(list(sizes)), strict=True))
    results = ranks.run(range(len(sizes)), reid_on_ranks.step, model, config, shards)
    output = model(images)
    losses = build_losses(config)
    assert losses.identity is not None
    loss = losses.metric(output.embedding, labels)[0] + losses.identity(output.logits, labels)[0]
    loss.backward()
    for value, gradients, buffers in results:
        close(value, loss, 1e-9)
        wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == wanted.keys()
        size = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
        for name, gradient in wanted.items():
            assert float((gradients[name] - gradient).norm()) <= 1e-7 * float(size), name
        for name, buffer in model.named_buffers():
            close(buffers[name], buffer, 1e-9)


def test_batch_norm_of_ranks_in_evaluation_and_errors() -> None:
    network = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)))
    before = network.state_dict()
    synced = sync_batchnorm(network, None).eval()
    assert isinstance(synced[0][0], GroupBatchNorm)  # type: ignore[index]
    assert synced.state_dict().keys() == before.keys()
    values = torch.randn(2, 3, 4, 4)
    assert torch.equal(synced(values), nn.BatchNorm2d(3).eval()(values))
    with pytest.raises(ValueError, match="expected BatchNorm1d, BatchNorm2d or BatchNorm3d inside"):
        sync_batchnorm(nn.BatchNorm1d(3), None)
    with pytest.raises(ValueError, match="got InPlaceNorm 'norm'"):
        sync_batchnorm(_WithOther(), None)


class InPlaceNorm(nn.BatchNorm2d):
    """A batch norm that does more."""


class _WithOther(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = InPlaceNorm(3)
