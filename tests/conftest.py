"""Which backends the suite runs, and fixtures that leave the process as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import hypothesis
import pytest
import torch

import sn_ops

# Every backend the suite runs. A new one is a line here, and the device its tensors live on a line in problems.DEVICES.
# Both of these are part of every build: one that is not usable fails the suite, it does not skip it.
BACKENDS = ("reference", "cpu")

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=40, database=None, print_blob=True
)
hypothesis.settings.load_profile("repeatable")


def require(name: str) -> str:
    """The name, if that backend is usable here."""
    facts = sn_ops.backends()[name]
    assert facts.usable, f"backend {name!r} must be usable to run its tests: {facts.reason}"
    return name


# Not function-scoped: hypothesis calls a test body many times with one fixture value.
@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn."""
    threads = torch.get_num_threads()
    if request.param == "reference":  # thousands of small dense operations: threads would only wait for each other
        torch.set_num_threads(1)
    yield require(request.param)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=[name for name in BACKENDS if name != "reference"])
def fused_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that promises memory, determinism and exact repetition."""
    return require(request.param)


@pytest.fixture
def core() -> Iterator[ModuleType]:
    """The native module; the CPU capability, path and number of threads are restored afterwards."""
    from sn_ops import ops

    require("cpu")
    module = ops.CORE
    assert module is not None
    capability, threads = module.cpu_capability(), torch.get_num_threads()
    yield module
    module.set_cpu_capability(capability)
    module.set_cpu_path("auto")
    torch.set_num_threads(threads)
