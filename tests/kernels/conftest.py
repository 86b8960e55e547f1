"""Kernel tests: seeded from their own name, with NaN in every uninitialised tensor."""

import zlib
from collections.abc import Iterator

import pytest
import torch

from twinflow_kernels import _backend


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, so an element that a kernel does not write fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def watched_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter no kernel touches what is not its own, or reads what was never written."""
    if _backend.interpreting():
        from helpers.red_zones import watch_kernels

        watch_kernels(monkeypatch)


@pytest.fixture(params=("baseline", "avx2", "avx512"))
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a C++ test once for each instruction set that the machine has; `_C.set_isa` may be called inside."""
    native = _backend.native()
    if native is None or _backend.interpreting():
        pytest.skip("no C++ backend in this process")
    try:
        native.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.set_isa(native.detected_isa())
