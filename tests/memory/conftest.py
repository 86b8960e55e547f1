"""Fixtures of the tests of memory."""

import pytest
from torch import distributed


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
