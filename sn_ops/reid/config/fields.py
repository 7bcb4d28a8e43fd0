"""Fields of a configuration: allowed values, values from text, and error messages."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import field
from typing import Any


class ConfigError(ValueError):
    """An invalid configuration: an unknown field, a value that is not allowed, or fields that contradict each other."""


def option(
    default: Any,
    about: str,
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with its help text and its allowed values: of `choices`, `>= least`, `> above`, `<= most`, `< below`."""
    metadata = {
        "about": about, "choices": tuple(choices), "least": least, "above": above, "most": most, "below": below,
    }  # fmt: skip
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def wrong(key: str, expected: str, value: object) -> ConfigError:
    """The error for a value that is not what was expected."""
    return ConfigError(f"sn_ops.reid: {key}: expected {expected}, got {value!r} of type {type(value).__name__}")


def _split(hint: Any) -> tuple[type[Any], bool]:
    """The type of a field, and whether it may be None."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in hint.__args__ if kind is not type(None)), True
    return typing.get_origin(hint) or hint, False


def coerce(hint: Any, value: Any) -> Any:
    """The value in its one form: a float for an int where the field is a float, and for 5e-5, which YAML 1.1 reads as
    text; None for "none", which help and messages use, and for "null".

    Equal configurations then have the same fingerprint.
    """
    kind, optional = _split(hint)
    if optional and _means_none(value):
        return None
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value  # `check` names the field
    return value


def _means_none(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() in ("none", "null")


def parse(key: str, hint: Any, text: str) -> Any:
    """The value of a command line's text.

    Raises:
        ConfigError: not a value of the field's type.
    """
    kind, optional = _split(hint)
    if optional and _means_none(text):
        return None
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise wrong(key, "true or false", text)
        return text.lower() == "true"
    if kind is dict:
        value = guess(text)
        if not isinstance(value, dict):
            raise wrong(key, 'a JSON object such as {"version": "V2"}', text)
        return value
    try:
        return kind(text)
    except ValueError as error:
        raise wrong(key, _describe(hint), text) from error


def guess(text: str) -> Any:
    """The value of text whose type is unknown: true or false in any case, JSON where it is JSON, text otherwise."""
    if text.lower() in ("true", "false"):  # the text "False" would count as true
        return text.lower() == "true"
    try:
        return json.loads(text)
    except ValueError:  # not JSON, or an int of more digits than Python converts
        return text


def _describe(hint: Any) -> str:
    kind, optional = _split(hint)
    name = {int: "an int", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}[kind]
    return f"{name} or none" if optional else name


def check(key: str, item: dataclasses.Field[Any], hint: Any, value: Any) -> None:
    """Checks a field's value.

    Raises:
        ConfigError: another type, or a value that `option` does not allow.
    """
    kind, optional = _split(hint)
    if value is None and optional:
        return
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong(key, _describe(hint), value)
    if isinstance(value, dict):
        _check_plain(key, value)
    limits = item.metadata
    if limits["choices"] and value not in limits["choices"]:
        raise wrong(key, f"one of {', '.join(map(repr, limits['choices']))}", value)
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong(key, "a finite number", value)
    if limits["least"] is not None and value < limits["least"]:
        raise wrong(key, f"at least {limits['least']}", value)
    if limits["above"] is not None and value <= limits["above"]:
        raise wrong(key, f"more than {limits['above']}", value)
    if limits["most"] is not None and value > limits["most"]:
        raise wrong(key, f"at most {limits['most']}", value)
    if limits["below"] is not None and value >= limits["below"]:
        raise wrong(key, f"less than {limits['below']}", value)


def _check_plain(key: str, value: object) -> None:
    """Raises unless YAML, JSON and a checkpoint can all store the value and return it unchanged."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise wrong(key, "names that are text", name)
            _check_plain(f"{key}.{name}", inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_plain(key, inner)
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise wrong(key, "text, a number, true, false, none, or a list or mapping of them", value)
