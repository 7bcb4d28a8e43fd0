"""SNLoss: the function as a module."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sn_ops
from support import problems

OPTIONS: dict[str, Any] = {"k": 3, "alpha": 7.5, "weight": 0.25, "squeeze": "support", "reduction": "sum"}


@pytest.fixture
def module(backend: str) -> sn_ops.SNLoss:
    return sn_ops.SNLoss(**OPTIONS, backend=backend)


def test_equals_the_function(backend: str, module: sn_ops.SNLoss) -> None:
    """With and without candidates, by position and by name."""
    case = problems.bank_case(9, 20, 12, 4, k=3, self_kind="tensor").on(backend)
    function = sn_ops.sn_loss(**{**case.arguments(), **OPTIONS}, backend=backend)
    called = module(case.feats, case.labels, case.candidates, case.candidate_labels, case.self_index)
    named = module(
        case.feats, case.labels, candidates=case.candidates,
        candidate_labels=case.candidate_labels, self_index=case.self_index,
    )  # fmt: skip
    assert called.equal(function) and named.equal(function)
    own = sn_ops.sn_loss(case.feats, case.labels, **OPTIONS, backend=backend)
    assert module(case.feats, case.labels).equal(own)


def test_takes_what_the_function_takes() -> None:
    """An option that the function gets must not be forgotten here, nor have another default."""

    def defaults(call: Callable[..., Any]) -> dict[str, Any]:
        return {name: parameter.default for name, parameter in inspect.signature(call).parameters.items()}

    both = defaults(sn_ops.SNLoss) | defaults(sn_ops.SNLoss.forward)
    assert both.pop("self") is inspect.Parameter.empty
    assert both == defaults(sn_ops.sn_loss)


def test_defaults_are_the_functions() -> None:
    case = problems.self_case(30, 8, 6)
    assert sn_ops.SNLoss()(case.feats, case.labels).equal(sn_ops.sn_loss(case.feats, case.labels))


def test_returns_statistics_when_asked(backend: str) -> None:
    case = problems.self_case(30, 8, 6).on(backend)
    loss, stats = sn_ops.SNLoss(backend=backend, return_stats=True)(case.feats, case.labels)
    expected, wanted = sn_ops.sn_loss(case.feats, case.labels, backend=backend, return_stats=True)
    assert loss.equal(expected) and all(a.equal(b) for a, b in zip(stats, wanted, strict=True))


def _saved(module: sn_ops.SNLoss) -> sn_ops.SNLoss:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: sn_ops.SNLoss = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved],
    ids=["copy", "deepcopy", "pickle", "save"],
)  # fmt: skip
def test_copies_compute_the_same(
    backend: str, module: sn_ops.SNLoss, duplicate: Callable[[sn_ops.SNLoss], sn_ops.SNLoss]
) -> None:
    case = problems.self_case(30, 8, 6).on(backend)
    other = duplicate(module)
    assert other is not module and repr(other) == repr(module)
    assert other(case.feats, case.labels).equal(module(case.feats, case.labels))


def test_repr_tells_every_option(backend: str, module: sn_ops.SNLoss) -> None:
    text = repr(module)
    assert text.startswith("SNLoss(")
    for part in ("k=3", "alpha=7.5", "weight=0.25", "'support'", "'sum'", f"'{backend}'"):
        assert part in text
    assert "return_stats=True" in repr(sn_ops.SNLoss(return_stats=True))


def test_has_nothing_to_train_or_store(backend: str, module: sn_ops.SNLoss) -> None:
    assert not list(module.parameters()) and not list(module.buffers()) and not module.state_dict()
    case = problems.self_case(30, 8, 6).on(backend)
    training = module(case.feats, case.labels)
    assert module.eval()(case.feats, case.labels).equal(training)
    assert module.to(torch.float64)(case.feats, case.labels).dtype == torch.float32
