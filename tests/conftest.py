"""Every test is seeded from its own name; what several tests build is kept on disk, new each run, for all workers."""

import os
import shutil
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# CI meets the same examples every time; a developer meets new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

BUILD = Path(__file__).resolve().parent.parent / "build"
SHARED = pytest.StashKey[Path]()
# Read by tests/helpers: tiny pipelines, and forecasts of memory.
FOLDERS = {"TWINFLOW_TINY_PIPELINES": "tiny-pipelines", "TWINFLOW_TEST_CACHE": "cache"}


def pytest_configure(config: pytest.Config) -> None:
    """Makes the shared folders, new each run; pytest-xdist's workers inherit the environment."""
    if hasattr(config, "workerinput") or os.environ.keys() >= FOLDERS.keys():
        return
    BUILD.mkdir(exist_ok=True)
    shared = config.stash[SHARED] = Path(tempfile.mkdtemp(prefix="tests-", dir=BUILD))
    for variable, name in FOLDERS.items():
        (shared / name).mkdir()
        os.environ.setdefault(variable, str(shared / name))


def pytest_unconfigure(config: pytest.Config) -> None:
    if SHARED in config.stash:
        shutil.rmtree(config.stash[SHARED], ignore_errors=True)
        for variable, name in FOLDERS.items():
            if os.environ[variable] == str(config.stash[SHARED] / name):
                del os.environ[variable]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seeded_by_name(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
