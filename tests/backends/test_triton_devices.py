"""Which devices the Triton backend serves, and which it refuses with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sn_ops import dispatch, triton
from support import fresh_python

SPELLINGS = (
    *("1", "true", "TRUE", "True", "on", "oN", "y", "Y", "yes", "YES"),
    *("0", "", " 1", "1 ", "01", "2", "-1", "t", "enabled", "off", "false", "no", "n"),
)


def test_the_interpreter_is_on_where_triton_says_so() -> None:
    """CPU tensors are served where Triton would interpret a kernel, and nowhere else: elsewhere it would compile."""
    script = f"""
import importlib, os, sys
from sn_ops import triton
assert "triton" not in sys.modules, "imported"
from triton import knobs
for value in {SPELLINGS!r}:
    os.environ["TRITON_INTERPRET"] = value
    importlib.reload(triton.tuning)
    assert triton.tuning.INTERPRETED == knobs.runtime.interpret, value
del os.environ["TRITON_INTERPRET"]
assert not importlib.reload(triton.tuning).INTERPRETED and not knobs.runtime.interpret
"""
    done = fresh_python.run("-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("value", "served"), [("yes", "('cuda', 'cpu')"), ("no", "('cuda',)")])
def test_devices_by_the_interpreter(value: str, served: str) -> None:
    done = fresh_python.run("-c", "from sn_ops import triton; print(triton.DEVICES)", TRITON_INTERPRET=value)
    assert done.stdout.strip() == served, done.stderr


def test_rocm_is_not_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch for ROCm calls its devices "cuda", and the capability of an MI300 is 9.4."""

    class OnRocm:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    monkeypatch.setattr(dispatch, "LOAD_ERROR", {"cuda": "not built"})
    choose: Any = dispatch.choose_backend
    for cuda, hip, chosen in (("13.0", None, "triton"), (None, "6.4.1", "reference"), (None, None, "reference")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        dispatch._known_choice.cache_clear()
        assert choose("auto", OnRocm) == chosen
        assert (triton.unfit(OnRocm.device) == "") == (chosen == "triton")
        if hip is not None:
            with pytest.raises(ValueError, match=r"needs PyTorch for CUDA, cuda:0 is served by one for ROCm 6\.4\.1"):
                choose("triton", OnRocm)
    dispatch._known_choice.cache_clear()
    assert triton.unfit(torch.device("cpu")) == ""
