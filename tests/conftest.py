"""Tests of the objective: seeded from their own name."""

import zlib

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_by_name(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
