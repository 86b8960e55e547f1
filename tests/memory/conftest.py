"""Fixtures of the tests of memory."""

import pytest
from helpers.offload_cases import copies
from torch import distributed


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(params=["at once", "late"])
def transfers(request, monkeypatch):
    """Copies of offloaded tensors: None, or those of a GPU at its worst."""
    yield from copies(request.param, monkeypatch)
