"""From images to pictures: train, killed; the same command; export; sample. By the command line alone."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_pipelines import tiny_pipeline
from helpers.training_cases import CONFIG, forked, photos, same, weights
from PIL import Image
from safetensors.torch import load_file

from twinflow.cli import main

SMALL = ["--resolution", "32", "--max_train_steps", "8", "--checkpointing_steps", "2", "--validation_steps", "4",
         "--validation_prompts", "the digit 5", "--eval_share", "0.1"]  # fmt: skip


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "twinflow", *map(str, arguments)]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100", "HOME": str(folder)}


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """A command that must end well, in some seconds, without a traceback."""
    found = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=200, cwd=folder,
                           env=environment(folder))  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    return found


def said_by(folder: Path, *arguments: object) -> None:
    """A command by the entry point, which ends well."""
    torch.set_num_threads(1)
    os.chdir(folder)
    with (folder / "said.txt").open("w") as said, redirect_stdout(said):
        assert main([str(argument) for argument in arguments]) == 0


def killed(folder: Path, *arguments: object) -> None:
    """Kills a command as soon as a checkpoint is there."""
    child = os.fork()
    if child == 0:
        try:
            said_by(folder, *arguments)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 200
    while not list(folder.glob("output/*/checkpoint-*")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def in_a_fork(folder: Path, *arguments: object) -> str:
    """A command by the entry point in a child; what it said."""
    assert forked(lambda: said_by(folder, *arguments)) == 0
    return (folder / "said.txt").read_text()


@pytest.mark.parametrize("family", ["sd3", "qwen_image"])
def test_images_train_kill_resume_export_sample(tmp_path, family):
    photos(tmp_path / "photos", 40)
    tiny_pipeline(family, tmp_path / "base")
    config = CONFIG | {"model_family": family, "pretrained_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    train = ("train", "config.json", "--instance_data_dir", "photos", *SMALL)
    killed(tmp_path, *train)
    root = tmp_path / "output" / "sd3-twinflow"
    assert not (root / "checkpoint-000008").exists()
    said = run(tmp_path, *train).stdout if family == "sd3" else in_a_fork(tmp_path, *train)
    assert "going on after step " in said and "done: 8 steps" in said and "encoding" not in said
    unbroken = [*train, "--output_dir", "output/unbroken", "--cache_dir", root / "cache", "--validation_steps", "0"]
    in_a_fork(tmp_path, *unbroken)
    step, found = weights(root)
    assert step == 8 and same(found, weights(tmp_path / "output" / "unbroken")[1])
    assert (root / "samples" / "base" / "grid.png").exists() and (root / "samples" / "step-000008").is_dir()
    assert "EMA" in in_a_fork(tmp_path, "export", root, "--out", "few-step")
    lora = load_file(tmp_path / "few-step" / "pytorch_lora_weights.safetensors")
    assert any(name.endswith("lora_B.weight") and value.any() for name, value in lora.items())
    drawing = ("--prompt", "the digit 5", "--steps", "2", "--seed", "0")
    for source, out in ((root, "of-run"), ("few-step", "of-export")):
        in_a_fork(tmp_path, "sample", source, *drawing, "--out", out)
    images = [np.array(Image.open(next((tmp_path / out).glob("*.png")))) for out in ("of-run", "of-export")]
    assert images[0].shape == (32, 32, 3) and images[0].std() > 5
    assert np.array_equal(*images)
    in_a_fork(tmp_path, "report", root)
    assert b"the digit 5" in (root / "report.html").read_bytes()
