"""Errors name the argument, what was expected and what was given; no good input is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import sn_ops
from support.backends import ON_GPU
from support.problems import on

FEATS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
BANK = {"candidates": FEATS + 1, "candidate_labels": LABELS}
NAN, INF = float("nan"), float("inf")

# name: (changed arguments, argument that the message names, other things it says). On the CPU for every backend: what
# is wrong with an argument is reported before the backend is asked whether it serves the device.
BAD: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "feats-list": ({"feats": [[1.0]]}, "feats", ["tensor", "list"]),
    "feats-none": ({"feats": None}, "feats", ["tensor", "None"]),
    "feats-array": ({"feats": FEATS.numpy()}, "feats", ["tensor", "ndarray"]),
    "feats-1d": ({"feats": FEATS[0]}, "feats", ["2", "[4]"]),
    "feats-3d": ({"feats": FEATS[None]}, "feats", ["2", "[1, 6, 4]"]),
    "feats-integer": ({"feats": FEATS.long()}, "feats", ["float", "int64"]),
    "feats-bool": ({"feats": FEATS > 0}, "feats", ["float", "bool"]),
    "feats-complex": ({"feats": FEATS.to(torch.complex64)}, "feats", ["float", "complex64"]),
    "feats-float8": ({"feats": FEATS.to(torch.float8_e4m3fn)}, "feats", ["float", "float8_e4m3fn"]),
    "feats-sparse": ({"feats": FEATS.to_sparse()}, "feats", ["sparse"]),
    "labels-list": ({"labels": [0, 0, 1, 1, 2, 2]}, "labels", ["tensor", "list"]),
    "labels-none": ({"labels": None}, "labels", ["tensor", "None"]),
    "labels-floating": ({"labels": LABELS.float()}, "labels", ["integer", "float32"]),
    "labels-bool": ({"labels": LABELS > 0}, "labels", ["integer", "bool"]),
    "labels-2d": ({"labels": LABELS[:, None]}, "labels", ["[6]", "[6, 1]"]),
    "labels-0d": ({"labels": LABELS[0]}, "labels", ["[6]", "[]"]),
    "labels-short": ({"labels": LABELS[:5]}, "labels", ["6", "5"]),
    "labels-device": ({"labels": LABELS.to("meta")}, "labels", ["cpu", "meta"]),
    "candidates-alone": ({"candidates": FEATS}, "candidate_labels", ["None"]),
    "candidate-labels-alone": ({"candidate_labels": LABELS}, "candidates", ["None"]),
    "candidates-list": ({**BANK, "candidates": [1.0]}, "candidates", ["tensor", "list"]),
    "candidates-1d": ({**BANK, "candidates": FEATS[0]}, "candidates", ["2", "[4]"]),
    "candidates-dims": ({**BANK, "candidates": FEATS[:, :3]}, "candidates", ["4", "[6, 3]"]),
    "candidates-dtype": ({**BANK, "candidates": FEATS.double()}, "candidates", ["float32", "float64"]),
    "candidates-integer": ({**BANK, "candidates": FEATS.long()}, "candidates", ["float", "int64"]),
    "candidates-device": ({**BANK, "candidates": FEATS.to("meta")}, "candidates", ["cpu", "meta"]),
    "candidate-labels-short": ({**BANK, "candidate_labels": LABELS[:5]}, "candidate_labels", ["6", "5"]),
    "candidate-labels-floating": ({**BANK, "candidate_labels": LABELS.float()}, "candidate_labels", ["float32"]),
    "candidate-labels-device": ({**BANK, "candidate_labels": LABELS.to("meta")}, "candidate_labels", ["meta"]),
    "k-zero": ({"k": 0}, "k", ["1", "0"]),
    "k-negative": ({"k": -3}, "k", ["1", "-3"]),
    "k-float": ({"k": 10.0}, "k", ["int", "10.0"]),
    "k-bool": ({"k": True}, "k", ["int", "True"]),
    "k-text": ({"k": "10"}, "k", ["int", "'10'"]),
    "k-none": ({"k": None}, "k", ["int", "None"]),
    "alpha-zero": ({"alpha": 0.0}, "alpha", ["> 0", "0.0"]),
    "alpha-negative": ({"alpha": -1}, "alpha", ["> 0", "-1"]),
    "alpha-nan": ({"alpha": NAN}, "alpha", ["finite", "nan"]),
    "alpha-inf": ({"alpha": INF}, "alpha", ["finite", "inf"]),
    "alpha-text": ({"alpha": "50"}, "alpha", ["'50'"]),
    "weight-negative": ({"weight": -0.1}, "weight", [">= 0", "-0.1"]),
    "weight-nan": ({"weight": NAN}, "weight", ["finite", "nan"]),
    "weight-inf": ({"weight": INF}, "weight", ["finite", "inf"]),
    "weight-none": ({"weight": None}, "weight", ["None"]),
    "squeeze-unknown": ({"squeeze": "max"}, "squeeze", ["span", "support", "nearest", "none", "'max'"]),
    "squeeze-none": ({"squeeze": None}, "squeeze", ["span", "support", "nearest", "none", "None"]),
    "squeeze-list": ({"squeeze": ["span"]}, "squeeze", ["span", "support", "nearest", "none", "list"]),
    "reduction-unknown": ({"reduction": "avg"}, "reduction", ["mean", "sum", "none", "'avg'"]),
    "backend-unknown": ({"backend": "gpu"}, "backend", ["auto", "cpu", "reference", "cuda", "triton", "'gpu'"]),
    "backend-none": ({"backend": None}, "backend", ["auto", "cpu", "reference", "None"]),
    "self-index-alone": ({"self_index": 0}, "self_index", ["candidates"]),
    "self-index-alone-tensor": ({"self_index": torch.arange(6)}, "self_index", ["candidates"]),
    "self-index-negative": ({**BANK, "self_index": -1}, "self_index", ["-1"]),
    "self-index-beyond": ({**BANK, "self_index": 1}, "self_index", ["6", "1"]),
    "self-index-float": ({**BANK, "self_index": 0.0}, "self_index", ["int", "0.0"]),
    "self-index-bool": ({**BANK, "self_index": True}, "self_index", ["int", "True"]),
    "self-index-list": ({**BANK, "self_index": [0] * 6}, "self_index", ["int", "list"]),
    "self-index-short": ({**BANK, "self_index": torch.arange(5)}, "self_index", ["6", "5"]),
    "self-index-2d": ({**BANK, "self_index": torch.arange(6)[:, None]}, "self_index", ["6", "[6, 1]"]),
    "self-index-floating": ({**BANK, "self_index": torch.arange(6.0)}, "self_index", ["integer", "float32"]),
    "self-index-entry-beyond": ({**BANK, "self_index": torch.arange(6) + 1}, "self_index", ["5", "6"]),
    "self-index-entry-below": ({**BANK, "self_index": torch.arange(6) - 2}, "self_index", ["-1", "-2"]),
    "self-index-device": ({**BANK, "self_index": torch.arange(6, device="meta")}, "self_index", ["cpu", "meta"]),
}  # fmt: skip

# `support_neighbors` and the call of a module take fewer arguments.
LOSS_ONLY = {"alpha", "weight", "squeeze", "reduction"}


def assert_named(error: Exception, argument: str, said: list[str]) -> None:
    message = str(error)
    assert re.search(rf"\b{argument}\b", message), message
    assert re.search(r"\bexpected\b.*\bgot\b", message, re.DOTALL), message
    for text in said:
        assert text in message, f"{text!r} not in {message!r}"


@pytest.mark.parametrize("name", BAD)
def test_sn_loss_refuses(backend: str, name: str) -> None:
    changed, argument, said = BAD[name]
    arguments = {"feats": FEATS, "labels": LABELS, "backend": backend, **changed}
    with pytest.raises((ValueError, TypeError)) as raised:
        sn_ops.sn_loss(arguments.pop("feats"), arguments.pop("labels"), **arguments)
    assert_named(raised.value, argument, said)


@pytest.mark.parametrize("name", [name for name, (changed, *_) in BAD.items() if not LOSS_ONLY & set(changed)])
def test_support_neighbors_refuses(backend: str, name: str) -> None:
    changed, argument, said = BAD[name]
    arguments = {"feats": FEATS, "labels": LABELS, "backend": backend, **changed}
    with pytest.raises((ValueError, TypeError)) as raised:
        sn_ops.support_neighbors(arguments.pop("feats"), arguments.pop("labels"), **arguments)
    assert_named(raised.value, argument, said)


OPTIONS = {"k", "alpha", "weight", "squeeze", "reduction", "backend"}


@pytest.mark.parametrize("name", [name for name, (changed, *_) in BAD.items() if OPTIONS & set(changed)])
def test_module_refuses_when_it_is_made(name: str) -> None:
    """A bad option is an error when the module is made, not in the first training step."""
    changed, argument, said = BAD[name]
    with pytest.raises((ValueError, TypeError)) as raised:
        sn_ops.SNLoss(**changed)
    assert_named(raised.value, argument, said)


def test_a_group_that_is_none(backend: str) -> None:
    with pytest.raises(TypeError, match=r"group: expected None, a torch.distributed process group .* got 'world'"):
        sn_ops.sn_loss(FEATS, LABELS, group="world", backend=backend)
    with pytest.raises(TypeError, match=r"group: expected None, a torch.distributed process group"):
        sn_ops.SNLoss(group=object())
    with pytest.raises(ValueError, match=r"group: .* member"):
        sn_ops.SNLoss(group=torch.distributed.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(ValueError, match="sizes: expected None without a group"):
        sn_ops.sn_loss(FEATS, LABELS, sizes=[6], backend=backend)


@pytest.mark.parametrize("name", ON_GPU)
def test_a_backend_that_cannot_serve_says_why(name: str) -> None:
    """An explicit backend never falls back silently."""
    facts = sn_ops.backends()[name]
    elsewhere = "meta" if "cpu" in facts.devices else "cpu"  # Triton's interpreter serves the CPU
    with pytest.raises((ValueError, RuntimeError)) as raised:
        sn_ops.sn_loss(FEATS.to(elsewhere), LABELS.to(elsewhere), backend=name)
    assert name in str(raised.value)
    assert facts.usable or facts.reason in str(raised.value)


def test_cpu_backend_refuses_other_devices(fused_backend: str) -> None:
    with pytest.raises(ValueError, match="meta"):
        sn_ops.sn_loss(FEATS.to("meta"), LABELS.to("meta"), backend=fused_backend)


@pytest.mark.parametrize(
    "changed",
    [
        {"k": 10**6},
        {"k": 1 << 63},
        {"k": 10**30},
        {"k": torch.tensor([3]).numpy()[0]},  # a NumPy integer is an int to everyone
        {"alpha": 50, "weight": 0},
        {"labels": LABELS.to(torch.int8)},
        {"labels": LABELS.repeat_interleave(2)[::2]},
        {"feats": FEATS[:1], "labels": LABELS[:1]},
        {"feats": FEATS[:, :1]},
        {"feats": FEATS[:0], "labels": LABELS[:0]},
        {**BANK, "self_index": torch.full((6,), -1)},
        {**BANK, "self_index": torch.arange(6, dtype=torch.int32)},
        {**BANK, "self_index": 0},
        {"candidates": FEATS[:0], "candidate_labels": LABELS[:0]},
        {"candidates": FEATS[:1], "candidate_labels": LABELS[:1].int()},
    ],
    ids=str,
)
def test_what_must_work(backend: str, changed: dict[str, Any]) -> None:
    arguments = on(backend, {"feats": FEATS, "labels": LABELS, "backend": backend, **changed})
    loss = sn_ops.sn_loss(arguments.pop("feats"), arguments.pop("labels"), **arguments)
    assert loss.isfinite()


def test_no_columns(backend: str) -> None:
    """D = 0: every row is the same point."""
    feats, labels = on(backend, (torch.empty(4, 0), torch.tensor([0, 0, 1, 1])))
    found = sn_ops.support_neighbors(feats, labels, k=2, backend=backend)
    assert found.indices.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        sn_ops.sn_loss(FEATS, LABELS, 10)  # type: ignore[call-overload]
