"""The benchmark's section memory: its lines, and what becomes of a run that fails."""

import json
import sys

import a100_1024
import memory_run
import memory_section
import networks
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
    [
        pytest.param(
            "90gb", 300.0, "failed: ArgumentError: apply_memory: preset must be auto or 80gb", marks=pytest.mark.slow
        ),
        ("80gb", 0.01, "over 0.01 s"),
    ],
)
def test_what_goes_wrong_is_an_outcome(run, limit_s, outcome):
    assert measured(Configuration("tiny-qwen-image", run), CPU, 1, limit_s)["outcome"].startswith(outcome)


def test_real_models_are_planned_only(tmp_path):
    asked = Asked(("sana-0.6b",), ("partition",), (1,), runs=("published", "checkpoint"), cap_gb=1.0)
    lines = measure_memory(asked, CPU)
    assert [line["outcome"] for line in lines] == [memory_section.PLANNED_ONLY] * 3
    published, checkpoint, auto = lines
    assert published["planned_bytes"] > 1e9 and "a100-80gb" in checkpoint["fits"]
    assert auto["planned_bytes"] is None and "memory must be at least" in auto["refusal"]
    text = memory_table(lines)
    assert "sana-0.6b" in text and f"{checkpoint['planned_bytes'] / 1e9:.1f}" in text
    memory_picture(lines, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "more, ending", [([], "_memory"), (["--depth", "2", "--cap-gb", "12.5"], "_depth2_cap12_5_memory")]
)
def test_the_files_of_a_run(more, ending, monkeypatch, tmp_path):
    arguments = ["--skip", "kernels", "training", "inference", "--presets", "checkpoint", "--out", str(tmp_path)]
    monkeypatch.setattr(a100_1024, "PLANNED_ON_CPU", ("sana-0.6b",))
    monkeypatch.setattr(sys, "argv", ["a100_1024.py", "--device", "cpu", *arguments, *more])
    a100_1024.main()
    (path,) = tmp_path.glob("*.json")
    assert path.stem.endswith(ending) and path.with_suffix(".png").exists()
    assert json.loads(path.read_text())["memory"][0]["outcome"] == memory_section.PLANNED_ONLY
    assert "| checkpoint |" in path.with_suffix(".md").read_text()


def test_out_of_memory_is_an_outcome(monkeypatch, capsys):
    def build(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(networks, "build", build)
    monkeypatch.setattr(sys, "argv", ["memory_run.py", "--model", "tiny-sana", "--run", "rows", "--device", "cpu"])
    memory_run.main()
    found = json.loads(capsys.readouterr().out)
    assert found == {"outcome": "out of memory", "message": "CUDA out of memory. Tried to allocate 2 GiB."}


def test_a_model_that_does_not_fit_is_named(monkeypatch, tmp_path):
    """The first network is too large; the run goes on with the second, of one block, and says so."""
    real = networks.build

    def build(name, *arguments, **settings):
        if name == "tiny-sana":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        student = real(name, *arguments, **settings)
        assert len(student.network.transformer_blocks) == 1
        return student

    monkeypatch.setattr(networks, "build", build)
    arguments = ["--model", "tiny-sana", "tiny-sd3", "--skip", "kernels", "training", "memory", "--depth", "1"]
    monkeypatch.setattr(sys, "argv", ["a100_1024.py", "--device", "cpu", *arguments, "--out", str(tmp_path)])
    a100_1024.main()
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["out_of_memory"] == {"inference": ["tiny-sana"]}
    assert {line["model"] for line in report["inference"]} == {"tiny-sd3"}
    assert "Out of memory: tiny-sana." in path.with_suffix(".md").read_text()
