"""The planner beside `torch.cuda.max_memory_allocated`: within 5 %, each configuration in a process of its own."""

import memory_section
import pytest
import torch
from memory_run import MEASURED, Configuration

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
WHOLE_GB = {"80gb": 84.0, "checkpoint": 60.0}  # of a card on which all of Qwen-Image runs


def found(configuration: Configuration) -> tuple[float, float]:
    """Planned and measured bytes."""
    forecast = memory_section.planned([configuration])[configuration.run]
    result = memory_section.measured(configuration, CUDA, 2, 500.0)
    assert result["outcome"] == MEASURED, result
    assert result["finite"]
    return forecast.peak, result["peak_bytes"]


@pytest.mark.parametrize("depth", [4, 6])
@pytest.mark.parametrize("run", ["rows", "80gb", "attention", "checkpoint", "published"])
def test_some_blocks_at_full_width(run, depth):
    planned, measured = found(Configuration("qwen-image", run, depth=depth))
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("run", ["80gb", "checkpoint"])
def test_the_whole_model(run):
    if torch.cuda.get_device_properties(0).total_memory < WHOLE_GB[run] * 1e9:
        pytest.skip(f"a card of less than {WHOLE_GB[run]:g} GB")
    planned, measured = found(Configuration("qwen-image", run, cap_gb=84.5))
    assert planned == pytest.approx(measured, rel=0.05)
    assert measured <= {"80gb": 75e9, "checkpoint": 57e9}[run]


@pytest.mark.parametrize("depth", [4, 6])
@pytest.mark.parametrize("run", ["40gb", "24gb", "16gb"])
def test_deferred_and_packed_blocks(run, depth):
    planned, measured = found(Configuration("qwen-image", run, depth=depth))
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("run, cap_gb, most", [("40gb", 42.0, 39e9), ("24gb", 25.0, 19e9)])
def test_the_whole_model_on_smaller_cards(run, cap_gb, most):
    planned, measured = found(Configuration("qwen-image", run, cap_gb=cap_gb))
    assert planned == pytest.approx(measured, rel=0.05)
    assert measured <= most


def test_sd35_large_on_a_24_gb_card():
    planned, measured = found(Configuration("sd3.5-large", "checkpoint", cap_gb=25.0))
    assert planned == pytest.approx(measured, rel=0.05)
    assert measured <= 22e9
