"""Tests of the objective: seeded from their own name."""

import os
import zlib

import pytest
import torch
from hypothesis import settings

# CI meets the same examples every time; a developer meets new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def seeded_by_name(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
