"""Which backends the suite runs, and fixtures that leave the process as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import hypothesis
import pytest
import torch

from support import simt_build, triton_interpreter

triton_interpreter.switch_on()

import sn_ops  # noqa: E402
from support.ranks import Ranks  # noqa: E402

triton_interpreter.speed_up()

# Every backend the suite runs. A new one is a line here, and the device its tensors live on a line in problems.DEVICES.
# All of these are part of every installation for tests: one that is not usable fails the suite, it does not skip it.
# "simt" are the CUDA kernels on emulated threads. Only "cuda" may be missing, where there is no GPU or the package was
# built without the kernels: its tests are skipped then, with that as the reason.
BACKENDS = ("reference", "cpu", "triton", "simt", "cuda")
# Emulated a thread or a program at a time: right at every size, but too slow for large ones.
EMULATED = ("simt",) if torch.cuda.is_available() else ("simt", "triton")

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=40, database=None, print_blob=True
)
hypothesis.settings.load_profile("repeatable")


def pytest_runtest_setup() -> None:
    """Every test begins with the same random numbers, whichever ran before it."""
    torch.manual_seed(0)


def require(name: str) -> str:
    """The name, if that backend is usable here.

    Skips the test where the CUDA kernels have a good reason to be missing, and fails it for every other: kernels that
    were built and do not load must not look like kernels that passed.
    """
    if name == "simt":
        simt_build.enable()
    facts = sn_ops.backends()[name]
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"no GPU here for the backend {name!r}")
    if name == "cuda" and facts.reason.startswith("not built"):
        pytest.skip(f"the backend {name!r} is {facts.reason}")
    assert facts.usable, f"backend {name!r} must be usable to run its tests: {facts.reason}"
    return name


def require_gpu(name: str) -> str:
    """The same for a test that only a GPU can run, whatever else serves the backend elsewhere."""
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU here for the backend {name!r}")
    return require(name)


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


@pytest.fixture(scope="session", params=["simt", "cuda"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The CUDA kernels, emulated and on a GPU: what `paths.forced` can give a path."""
    return require(request.param)


@pytest.fixture(scope="session", params=[name for name in BACKENDS if name not in ("reference", *EMULATED)])
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
    """Four processes for the whole session: 1, 2 or 3 of them make the smaller worlds."""
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
