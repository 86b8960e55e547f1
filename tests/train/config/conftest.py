"""A config file of a test."""

from pathlib import Path

import pytest


@pytest.fixture
def written(tmp_path):
    def write(text: str | bytes, name: str = "config.json") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write
