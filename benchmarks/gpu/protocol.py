"""How a step reports to the runner: by lines on standard output, so that a crash loses nothing that was reported.

What follows MARK in a line, to its end, is a JSON object. Its `data` is merged into the step's data: objects key by
key, lists by appending, anything else by replacing. `figure` is the step's entry in the table at the end, `reason`
why it did not pass. All other output goes to the log. A message that cannot be read fails its step, whose data would
be incomplete.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NoReturn

MARK = "@kit "
NOT_RUN = 77
"""Exit status of a step that lacks what it needs; `reason` says what."""

PRETEND = "SN_OPS_KIT_PRETEND"
"""Environment variable that is set while the kit is rehearsed without a GPU."""

EMULATED_PROBE = "SN_SIMT_PROBE"
"""Environment variable with the path of `sn_gpu_probe` for emulated threads, which a rehearsal runs."""


def pretending() -> bool:
    """Whether this is a rehearsal."""
    return os.environ.get(PRETEND) == "1"


def say(figure: str | None = None, reason: str | None = None, **data: Any) -> None:
    """Tell the runner."""
    message = {"figure": figure, "reason": reason, "data": data or None}
    text = json.dumps({key: value for key, value in message.items() if value is not None}, allow_nan=False)
    sys.stdout.write(f"{MARK}{text}\n")  # one write, so that other output does not split the line
    sys.stdout.flush()


def not_run(reason: str) -> NoReturn:
    """End this process: it lacks what it needs."""
    say(reason=reason)
    sys.exit(NOT_RUN)


def fail(reason: str) -> NoReturn:
    """End this process: what it looked at is wrong."""
    say(reason=reason)
    sys.exit(1)


class MessageError(ValueError):
    """What a step reported is not a message."""


def parse(text: str) -> dict[str, Any]:
    """The message after MARK.

    Raises:
        MessageError: saying what is wrong with it.
    """

    def refuse(constant: str) -> NoReturn:
        raise MessageError(f"{constant} is no number of JSON")

    try:
        message = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{error}: {text[:80]!r}") from None
    if not isinstance(message, dict):
        raise MessageError(f"expected an object, got {text[:80]!r}")
    for key, value in message.items():
        wanted = {"figure": str, "reason": str, "data": dict}.get(key)
        if wanted is None or not isinstance(value, wanted):
            raise MessageError(f"expected figure, reason and data, got {key!r} with {value!r:.60}")
    if not isinstance(message.get("data", {}).get("provenance", {}), dict):
        raise MessageError("expected an object as provenance")
    return message


def merge(into: dict[str, Any], news: dict[str, Any]) -> None:
    """Merge the `data` of one message into that of earlier ones."""
    for key, value in news.items():
        known = into.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            merge(known, value)
        elif isinstance(known, list) and isinstance(value, list):
            known.extend(value)
        else:
            into[key] = value
