"""The benchmark's section memory: its lines, and what becomes of a run that fails."""

import memory_section
import pytest
import torch
from memory_run import MEASURED, Configuration
from memory_section import Asked, measure_memory, measured
from report import memory_picture, memory_table

CPU = torch.device("cpu")


def test_a_run_in_a_process_of_its_own():
    result = measured(Configuration("tiny-qwen-image", "80gb"), CPU, 1, 300.0)
    assert result["outcome"] == MEASURED and result["finite"]
    assert result["peak_bytes"] > 1e6 and result["median_s"] > 0
    assert result["preset"] == "memory preset 80gb: 1 row(s) at a time; blocks keep products"


@pytest.mark.parametrize(
    "run, limit_s, outcome",
    [("90gb", 300.0, "failed: ValueError: memory: preset must be auto or 80gb"), ("80gb", 0.01, "over 0.01 s")],
)
def test_what_goes_wrong_is_an_outcome(run, limit_s, outcome):
    assert measured(Configuration("tiny-qwen-image", run), CPU, 1, limit_s)["outcome"].startswith(outcome)


def test_real_models_are_planned_only(tmp_path):
    asked = Asked(("sana-0.6b",), ("partition",), (4,), runs=("published", "checkpoint"), cap_gb=1.0)
    lines = measure_memory(asked, CPU)
    assert [line["outcome"] for line in lines] == [memory_section.PLANNED_ONLY] * 3
    published, checkpoint, auto = lines
    assert published["planned_bytes"] > 1e9 and "a100-80gb" in checkpoint["fits"]
    assert auto["planned_bytes"] is None and "memory must be at least" in auto["refusal"]
    text = memory_table(lines)
    assert "sana-0.6b" in text and f"{checkpoint['planned_bytes'] / 1e9:.1f}" in text
    memory_picture(lines, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 5000
