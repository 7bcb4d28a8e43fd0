"""Configuration: YAML, overrides, what is refused; presets against the recipe; the learning rate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sn_ops.reid.config import (
    SECTIONS,
    Config,
    ConfigError,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    from_dict,
    from_yaml,
    keys,
    to_dict,
    to_yaml,
)
from sn_ops.reid.config.presets import PRESETS, about, preset
from sn_ops.reid.training.schedule import learning_rate


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    config = preset(name).override("data.options.version=V2", "model.dim=64", "loss.margin=none")
    to_yaml(config, tmp_path / "config.yaml")
    assert from_yaml(tmp_path / "config.yaml") == config
    assert from_dict(to_dict(config)) == config


def test_yaml_gives_some_fields(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("optim: {lr: 5e-5, epochs: 3, warmup_epochs: 1}\nmodel: {dim: 32}\n")
    config = from_yaml(file)  # 5e-5 is text to YAML 1.1
    assert config.optim.lr == 5e-5 and config.optim.epochs == 3 and config.model.dim == 32
    assert config.loss == Config().loss
    file.write_text("")
    assert from_yaml(file) == Config()


def test_overrides() -> None:
    config = Config().override(
        "loss.k=8",
        "optim.lr=5e-5",
        "model.neck=true",
        "loss.identity=1",
        "data.options.quick=true",
        "model.weights=a=b",
    )
    assert config.loss.k == 8 and config.optim.lr == 5e-5 and config.model.neck and config.loss.identity == 1.0
    assert config.data.options == {"quick": True} and config.model.weights == "a=b"
    assert Config().data.options == {} and Config().loss.k == 10
    assert config.override("data.options={}", "model.weights=none").data.options == {}
    for text, value in [("False", False), ("TRUE", True), ("false", False), ("null", None), ("3", 3), ("V2", "V2")]:
        options = config.override(f"data.options.check={text}").data.options
        assert options["check"] is value or (type(options["check"]) is type(value) and options["check"] == value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("loss.q=1", r"expected one of loss\.metric, .*loss\.k.* got 'loss\.q'"),
        ("los.k=1", r"expected one of data\.name.*eval\.every.* got 'los\.k'"),
        ("loss", "expected section.field=value"),
        ("loss=1", "got 'loss'"),
        ("loss.k=2.5", r"loss\.k: expected an int, got '2.5'"),
        ("loss.k=0", r"loss\.k: expected at least 1, got 0"),
        ("loss.alpha=0", r"loss\.alpha: expected more than 0"),
        ("optim.lr=nan", r"optim\.lr: expected a finite number"),
        ("loss.squeeze=wide", r"loss\.squeeze: expected one of 'span', 'support', 'nearest', 'none', 'pair'"),
        ("model.neck=perhaps", r"model\.neck: expected true or false"),
        ("model.neck=true", r"model\.neck: expected loss\.identity > 0"),
        ("loss.metric=none", "expected a metric term or an identity loss"),
        ("loss.metric_weight=0", "expected a metric term or an identity loss"),
        ("data.options=V2", r"data\.options: expected a JSON object"),
        ("data.flip=1.5", r"data\.flip: expected at most 1"),
        ("optim.warmup_epochs=1000", r"optim\.warmup_epochs: expected at most optim\.epochs"),
        ("optim.accumulate=65", r"optim\.accumulate: expected at most the 64 images"),
        ("optim.accumulate=10000000000000000000000000", r"optim\.accumulate: expected at most the 64 images"),
        ("loss.label_smoothing=1", r"loss\.label_smoothing: expected less than 1\.0, got 1\.0"),
        ("run.seed=18446744073709551616", r"run\.seed: expected at most 9223372036854775807"),
        ("run.seed=9223372036854775808", r"run\.seed: expected at most 9223372036854775807"),
    ],
)
def test_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Config().override(assignment)
    assert str(caught.value).startswith("sn_ops.reid: ")


def test_refused_in_files(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    for text, message in [
        ("loss: {k: many}", r"loss\.k: expected an int"),
        ("loss: {k: true}", r"loss\.k: expected an int"),
        ("loss: {alpha: wide}", r"loss\.alpha: expected a number"),
        ("loss: 3", "loss: expected a mapping"),
        ("[1, 2]", "expected a mapping with sections"),
        ("speed: {k: 1}", "got 'speed'"),
        ("loss: {k: [", "expected YAML"),
        ("1: 2", r"expected one of data\.name.* got '1'"),
        ("loss: {1: 2}", r"expected one of loss\.metric.* got 'loss\.1'"),
        ("loss: {k: none}", r"loss\.k: expected an int, got 'none'"),
        (f"optim: {{lr: 1{400 * '0'}}}", r"optim\.lr: expected a number"),
        ("data: {name: 2024-13-45}", "expected YAML"),
        ("data: {options: {1: 2}}", r"data\.options: expected names that are text, got 1"),
        ("data: {options: {a: [{1: 2}]}}", r"data\.options\.a: expected names that are text, got 1"),
        ("data: {options: {a: 2024-12-24}}", r"data\.options\.a: expected text, a number, .*got datetime\.date"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            from_yaml(file)


def test_one_value_has_one_form(tmp_path: Path) -> None:
    """An int where a float belongs, and none as messages write it, from Python and from YAML."""
    base = Config()
    made = dataclasses.replace(base, loss=dataclasses.replace(base.loss, alpha=50, margin=1), eval=EvalConfig())
    assert isinstance(made.loss.alpha, float) and isinstance(made.loss.margin, float)
    wanted = base.override("loss.margin=1")
    assert made == wanted and made.fingerprint() == wanted.fingerprint()
    assert made.fingerprint() == from_dict(to_dict(made)).fingerprint()
    to_yaml(made, tmp_path / "c.yaml")
    assert from_yaml(tmp_path / "c.yaml").fingerprint() == made.fingerprint()
    assert OptimConfig(warmup_epochs=2, clip=1).warmup_epochs.is_integer()
    for kind in SECTIONS.values():  # every field of every section
        floats = [item for item in dataclasses.fields(kind) if isinstance(item.default, float)]
        section = kind(**{item.name: 1 for item in floats})
        assert all(isinstance(getattr(section, item.name), float) for item in floats)
    file = tmp_path / "none.yaml"
    file.write_text("loss: {margin: none}\nmodel: {weights: None, dim: null}\nrun: {out: 'none'}\n")
    config = from_yaml(file)
    assert (config.loss.margin, config.model.weights, config.model.dim, config.run.out) == (None,) * 4
    assert ModelConfig(weights="none").weights is None and ModelConfig(name="none").name == "none"


@pytest.mark.parametrize(
    ("assignments", "got"),
    [
        (("data.identities=1", "data.images=1"), 1),
        (("optim.accumulate=33",), 1),
        (("optim.accumulate=64",), 1),
        (("data.identities=3", "data.images=1", "optim.accumulate=2"), 1),
    ],
)
def test_a_neck_needs_two_images(assignments: tuple[str, ...], got: int) -> None:
    """In every chunk: batch norm in training mode has no statistics of one image."""
    neck = ("model.neck=true", "loss.identity=1")
    with pytest.raises(ConfigError, match=f"model.neck: expected at least 2 images in every chunk.* got {got}: "):
        Config().override(*neck, *assignments)
    assert Config().override("loss.identity=1", *assignments)
    assert Config().override(*neck, "optim.accumulate=32") and Config().override(*neck, "data.identities=1")


def test_help_for_every_field() -> None:
    assert all(text for text in keys().values())
    assert all(about(name) for name in PRESETS)
    with pytest.raises(ConfigError, match="expected one of 'default'"):
        preset("best")


def test_fingerprint() -> None:
    config = Config()
    assert config.fingerprint() == Config().fingerprint()
    for free in ("run.out=x", "run.threads=1", "data.root=x", "data.workers=0", "run.log_every=3", "eval.every=1"):
        assert config.override(free).fingerprint() == config.fingerprint(), free
    for key in ("loss.k=8", "run.seed=1", "optim.epochs=41", "data.options.quick=true", "model.dim=8"):
        assert config.override(key).fingerprint() != config.fingerprint(), key


def test_the_papers_recipe() -> None:
    """Every value of the authors' recipe."""
    config = preset("paper")
    assert (config.model.name, config.model.weights, config.model.last_stride) == ("resnet50", "imagenet", 1)
    assert config.model.dim is None and not config.model.neck and config.loss.normalize
    assert (config.data.height, config.data.width) == (256, 128)
    assert (config.data.flip, config.data.pad, config.data.erase) == (0.5, 0, 0.0)
    assert (config.data.identities, config.data.images) == (32, 4)
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("adam", 5e-5, 5e-4)
    assert (config.optim.epochs, config.optim.warmup_epochs, config.optim.amp) == (800, 0, "off")
    assert (config.loss.metric, config.loss.alpha, config.loss.k, config.loss.weight) == ("sn", 50, 10, 0.1)
    assert (config.loss.identity, config.loss.metric_weight) == (0, 1)
    for epoch in range(1, 801):
        wanted = 5e-5 if epoch <= 75 else 5e-5 * 0.001 ** ((epoch + 1 - 76) / (800 + 1 - 76))
        assert learning_rate(config.optim, epoch - 1, 5, 24) == pytest.approx(wanted, rel=1e-12)


def test_the_preset_for_comparing_losses() -> None:
    """Runs of two losses differ in the metric term only."""
    config = preset("metric")
    assert config.loss.identity == 0 and not config.model.neck and config.loss.metric == "sn"
    assert config.data == preset("default").data


def test_the_present_day_preset() -> None:
    config = preset("modern")
    assert config.model.neck and config.loss.identity == 1 and config.loss.label_smoothing == 0.1
    assert config.data.erase == 0.5 and config.optim.amp == "bf16" and config.loss.metric == "sn"
    assert config.optim.schedule == "cosine" and config.optim.warmup_epochs == 10


def test_warm_up_and_cosine() -> None:
    optim = OptimConfig(lr=2.0, epochs=10, schedule="cosine", decay_floor=0.01, warmup_epochs=2, warmup_start=0.1)
    rates = [learning_rate(optim, epoch, step, 4) for epoch in range(10) for step in range(4)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.1) and rates[8] == pytest.approx(2.0)
    assert rates[:9] == sorted(rates[:9]) and rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[24] == pytest.approx(2.0 * (0.01 + 0.99 / 2))  # half of the way
    assert learning_rate(optim, 10, 0, 4) == pytest.approx(0.02)
    constant = dataclasses.replace(optim, schedule="constant")
    assert learning_rate(constant, 9, 3, 4) == 2.0
    short = dataclasses.replace(optim, schedule="paper", warmup_epochs=0.0)
    assert {learning_rate(short, epoch, 0, 4) for epoch in range(10)} == {2.0}  # ends before the decay starts
