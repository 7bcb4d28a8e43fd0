"""Fixtures that every suite uses: backends, the native module, ranks."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import hypothesis
import pytest
import torch

from support import triton_interpreter

triton_interpreter.switch_on()

from support import backends  # noqa: E402
from support.backends import require  # noqa: E402
from support.ranks import Ranks  # noqa: E402

triton_interpreter.speed_up()

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=40, database=None, print_blob=True
)
hypothesis.settings.load_profile("repeatable")


def pytest_runtest_setup() -> None:
    """Every test starts from the same seed, whatever ran before it."""
    torch.manual_seed(0)


# Not function-scoped: hypothesis calls a test body many times with one fixture value.
@pytest.fixture(scope="session", params=backends.NAMES)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(backends.threads_of(request.param))
    yield require(request.param)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=backends.FUSED)
def fused_backend(request: pytest.FixtureRequest) -> str:
    """Each backend that promises memory, determinism and exact repetition."""
    return require(request.param)


@pytest.fixture(scope="session", params=backends.CUDA_KERNELS)
def kernels(request: pytest.FixtureRequest) -> str:
    """The CUDA kernels, emulated and on a GPU: backends that `forced` can give a path."""
    return require(request.param)


@pytest.fixture(scope="session", params=backends.FULL_SPEED)
def full_speed_backend(request: pytest.FixtureRequest) -> str:
    """Each fused backend that can be given a large batch here."""
    return require(request.param)


@pytest.fixture
def core() -> Iterator[ModuleType]:
    """The native module; the CPU capability, path and number of threads are restored afterwards."""
    from sn_ops import dispatch

    require("cpu")
    module = dispatch.CORE
    assert module is not None
    capability, threads = module.cpu_capability(), torch.get_num_threads()
    yield module
    module.set_cpu_capability(capability)
    module.set_cpu_path("auto")
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes for the whole session; groups of 1, 2 or 3 of them are the smaller worlds."""
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
