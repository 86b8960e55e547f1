"""The command line: `twinflow plan`."""

import json
from pathlib import Path

import pytest
import tomllib
from matplotlib.image import imread

from twinflow.cli import main

ROOT = Path(__file__).resolve().parents[2]
FAST = ["plan", "--model", "sana-0.6b", "--no-peers"]


def test_a_plan_as_table_picture_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    files = tmp_path / "plan.json", tmp_path / "plan.png"
    asked = [*FAST, "--gpu", "rtx-4090", "--lora-rank", "8", "--batch", "2"]
    assert main([*asked, "--json", str(files[0]), "--png", str(files[1])]) == 0
    shown = capsys.readouterr().out
    assert "sana-0.6b, LoRA r=8, 1024x1024, 300 text tokens, batch 2, recipe partition" in shown
    assert "> batch" in shown and "memory preset batch: the whole batch at once; blocks keep all" in shown
    assert "rtx-4090 hands out about 25 GB beside 0.5 GB of CUDA context" in shown
    report = json.loads(files[0].read_text())
    assert report["best"] == "batch" and len(report["forecasts"]) == 6
    first = report["forecasts"][0]
    assert sum(first["bytes"].values()) == first["peak_bytes"] and first["seconds"] > 0 and "rtx-4090" in first["fits"]
    assert f"{first['peak_bytes'] / 1e9:.1f}" in shown
    height, width, _ = imread(files[1]).shape
    assert height > 300 and width > 900


def test_every_number_shows_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*FAST, "--full", "--batch", "1", "--gpu", "h200"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("checkpoint-offload")]
    peak, *parts, host = [float(number) for number in line.split()[1:7]]
    assert peak == pytest.approx(sum(parts), abs=0.3) and line.split()[7] == "yes"
    assert host > 0 and "Host: pinned memory" in shown
    assert "Train: adapters, optimizer states, EMA and gradients." in shown


def test_json_to_the_terminal_is_json_alone(capsys):
    assert main([*FAST, "--full", "--batch", "1", "--json", "-"]) == 0
    out = capsys.readouterr().out
    assert "all weights" in json.loads(out)["workload"]


def test_nothing_fits(capsys):
    assert main([*FAST, "--batch", "1", "--memory-gb", "2"]) == 1
    streams = capsys.readouterr()
    assert " no " in streams.out
    assert "twinflow plan: plan: memory must be at least" not in streams.err  # said once
    assert "memory must be at least 1" in streams.err and "which preset" in streams.err and "got 2 GB" in streams.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "qwen-imag"], "twinflow plan: model must be qwen-image or z-image (others: "),
        (["--model", "qwen-image", "--gpu", "a100-80"], "gpu must be a100-80gb or a100-40gb"),
        (["--model", "qwen-image", "--resolution", "big"], "resolution must be pixels as 1024 or 1024x768, got 'big'"),
        (["--model", "qwen-image", "--resolution", "1000x1024"], "resolution must be a multiple of 16 pixels, got"),
        (["--model", "qwen-image", "--memory-gb", "-3"], "memory_gb must be > 0, got -3"),
        (["--model", "qwen-image", "--recipe", "dmd2"], "recipe must be one of partition, all_terms, got 'dmd2'"),
        (["--model", "qwen-image", "--full", "--base", "nf4"], "base must be bfloat16 or float32 where all weights"),
        (["--model", "qwen-image", "--json", "/none/plan.json"], "files must go into a folder that exists, got /none"),
        ([], "the following arguments are required: --model"),
    ],
)
def test_mistakes_have_a_line_and_status_two(arguments, message, capsys):
    try:
        assert main(["plan", *arguments]) == 2
    except SystemExit as end:
        assert end.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_help_has_units(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "GB (1e9 bytes) that the allocator may use" in text and "(default: a100-80gb)" in text


def test_the_script_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["twinflow"] == "twinflow.cli:main"
    assert {"twinflow[diffusers]"} < set(project["optional-dependencies"]["plan"])
