"""Data sets by name, and the types of their options."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from sn_ops.reid.data import DATASETS, load_dataset


def test_the_registry_names_what_it_knows(tmp_path: Path) -> None:
    assert list(DATASETS) == ["market1501", "dukemtmc-reid", "msmt17", "cuhk03", "cuhk01", "folder", "synthetic"]
    with pytest.raises(ValueError, match=r"expected one of market1501, .*, synthetic, got 'market'"):
        load_dataset("market", tmp_path)
    with pytest.raises(TypeError, match=r"options of market1501: expected distractors, check_counts, got 'version'"):
        load_dataset("market1501", tmp_path, version="V2")
    with pytest.raises(TypeError, match=r"options of synthetic: expected quick, workers, seed, .*, got 'people'"):
        load_dataset("synthetic", tmp_path, people=3)


@pytest.mark.parametrize(
    ("name", "option", "value", "expected"),
    [
        ("market1501", "check_counts", "False", "true or false"),
        ("dukemtmc-reid", "check_counts", "no", "true or false"),
        ("cuhk03", "check_counts", 0, "true or false"),
        ("synthetic", "quick", "no", "true or false"),
        ("synthetic", "workers", "two", "an int"),
        ("synthetic", "workers", True, "an int"),
        ("market1501", "distractors", 5, "text or a path or none"),
        ("msmt17", "version", ["V1"], "text"),
        ("msmt17", "version", 1, "text"),
        ("cuhk03", "boxes", ["labeled"], "text"),
        ("cuhk03", "cache", 1.5, "text or a path or none"),
        ("cuhk01", "split_seed", "x", "an int"),
        ("cuhk01", "split_seed", None, "an int"),
        ("cuhk01", "test_identities", "half", "an int"),
        ("cuhk01", "shots", "2", "an int"),
        ("cuhk01", "shots", 1.0, "an int"),
        ("cuhk01", "shots", True, "an int"),
        ("folder", "csv", 5, "text or a path or none"),
    ],
)
def test_options_have_types(tmp_path: Path, name: str, option: str, value: object, expected: str) -> None:
    """Text is no bool, whatever it says; the check comes before any file is looked for."""
    message = (
        f"sn_ops.reid: options of {name}: {option}: expected {expected}, got {value!r} of type {type(value).__name__}"
    )
    with pytest.raises(TypeError) as caught:
        load_dataset(name, tmp_path / "nowhere", **{option: value})
    assert str(caught.value) == message


def test_every_option_has_a_type_that_is_checked(tmp_path: Path) -> None:
    """A new option whose type the check does not know fails here."""
    for name, loader in DATASETS.items():
        for parameter in inspect.signature(loader).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                with pytest.raises(TypeError, match=f"^sn_ops.reid: options of {name}: {parameter.name}: expected "):
                    load_dataset(name, tmp_path, **{parameter.name: 1j})


@pytest.mark.parametrize("name", ["cuhk01", "synthetic"])
@pytest.mark.parametrize("option", ["root", "name"])
def test_what_load_dataset_itself_takes_is_no_option(tmp_path: Path, name: str, option: str) -> None:
    with pytest.raises(TypeError, match=rf"^sn_ops.reid: options of {name}: expected .*, got '{option}'"):
        load_dataset(name, tmp_path, **{option: "x"})
