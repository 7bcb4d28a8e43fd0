"""How a step tells the runner what it found: lines on standard output, so that nothing said is lost by a crash.

A line that begins with MARK holds a JSON object. Its `data` is merged into the step's data: objects key by key, lists
by appending, anything else by replacing. `figure` is the step's word in the table at the end, `reason` why it did not
pass. All other lines are for the log.
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


def pretending() -> bool:
    """Whether this is a rehearsal."""
    return os.environ.get(PRETEND) == "1"


def say(figure: str | None = None, reason: str | None = None, **data: Any) -> None:
    """Tell the runner."""
    message = {"figure": figure, "reason": reason, "data": data or None}
    print(MARK + json.dumps({key: value for key, value in message.items() if value is not None}), flush=True)


def not_run(reason: str) -> NoReturn:
    """End this process: it lacks what it needs."""
    say(reason=reason)
    sys.exit(NOT_RUN)


def fail(reason: str) -> NoReturn:
    """End this process: what it looked at is wrong."""
    say(reason=reason)
    sys.exit(1)


def merge(into: dict[str, Any], news: dict[str, Any]) -> None:
    """What `data` of one message does to what was said before."""
    for key, value in news.items():
        known = into.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            merge(known, value)
        elif isinstance(known, list) and isinstance(value, list):
            known.extend(value)
        else:
            into[key] = value
