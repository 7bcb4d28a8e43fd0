"""Triton's interpreter for the suite: switched on where there is no GPU, and made quick enough to run every case.

The interpreter patches Triton's language at each call of a function inside a kernel, minima and sums included, which
costs ten times the call itself. Once a module and launch is enough, since the patch stays until the launch ends. The
patch is global, so launches of several threads take turns here. The interpreter also truncates to bfloat16 where a GPU
rounds to nearest; here it rounds.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from typing import Any

import torch


def switch_on() -> None:
    """Call it before Triton is imported, which reads the variable. With a GPU, kernels are compiled and run there."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def speed_up() -> None:
    """Patch the language once a module and launch, and round to bfloat16."""
    from sn_ops.triton import tuning  # which reads the variable too

    # Without Triton, only the tests of its backend fail, and they say why.
    if not tuning.INTERPRETED or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_rounded(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        # The interpreter truncates; a GPU rounds to the nearest bfloat16, ties to even.
        if source == interpreter.tl.float32 and target == interpreter.tl.bfloat16:
            rounded = torch.from_numpy(values.copy()).bfloat16()
            return rounded.view(torch.int16).numpy().view("uint16").reshape(values.shape)
        return convert(values, source, target, rounding)

    interpreter._convert_float = convert_rounded
    prepared: set[int] = set()
    turn = threading.Lock()
    launch, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launch_afresh(self: Any, *arguments: Any, **options: Any) -> Any:
        with turn:
            prepared.clear()
            return launch(self, *arguments, **options)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in prepared:
            prepare(self.fn)
            prepared.add(module)
        return self.rewrite()(*arguments, **options)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter.InterpretedFunction.__call__ = call
