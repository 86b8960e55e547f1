"""Runs of the trainer for tests: real images with captions, tiny pipelines, and processes that are killed."""

import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.tiny_pipelines import saved_pipeline
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits, load_sample_images

from twinflow.train import read_config
from twinflow.train.checkpoint.checkpoint import latest_checkpoint, read_checkpoint
from twinflow.train.config.settings import TrainSettings

# The config file that users of other trainers bring, as it is.
CONFIG = json.loads("""{"model_family": "sd3", "model_type": "lora",
 "pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large", "output_dir": "output/sd3-twinflow",
 "distillation_method": null, "use_ema": true, "twinflow_enabled": true, "twinflow_target_step_count": 2,
 "twinflow_estimate_order": 2, "twinflow_enhanced_ratio": 0.5, "twinflow_delta_t": 0.01, "twinflow_target_clamp": 1.0,
 "learning_rate": 1e-4, "train_batch_size": 1, "gradient_accumulation_steps": 4, "mixed_precision": "bf16",
 "validation_guidance": 0.0, "validation_num_inference_steps": 2}""")


def photos(folder: Path, count: int = 40) -> Path:
    """Digits, and pieces of two photographs, in three shapes, each with a caption in a .txt file."""
    folder.mkdir(parents=True, exist_ok=True)
    data, pictures = load_digits(), load_sample_images()
    names = ("a temple", "a flower")
    for k in range(count):
        if k % 2:
            image, words = Image.fromarray((data.images[k] * 15).astype(np.uint8)), f"the digit {data.target[k]}"
        else:
            place = 20 * k % 300
            image = Image.fromarray(pictures.images[k // 2 % 2][place : place + 96, place : place + 96])
            words = f"{names[k // 2 % 2]}, piece {k}"
        shape = ((32, 32), (32, 32), (48, 32), (32, 48))[k % 4]
        image.convert("RGB").resize(shape).save(folder / f"{k:02}.png")
        (folder / f"{k:02}.txt").write_text(words)
    return folder


def settings(folder: Path, family: str = "sd3", **changes: Any) -> TrainSettings:
    """A short run on a tiny pipeline; its photographs and its output are in the folder."""
    if not (folder / "photos").is_dir() and "prompts_file" not in changes:
        photos(folder / "photos", 12)
    chosen = {
        "pretrained_model_name_or_path": str(saved_pipeline(family)), "output_dir": str(folder / "run"),
        "instance_data_dir": str(folder / "photos"), "resolution": 64 if family == "sana" else 32, "lora_rank": 2,
        "use_ema": True, "twinflow_enabled": True, "gradient_accumulation_steps": 2, "max_train_steps": 6,
        "logging_steps": 2, "checkpointing_steps": 2, "validation_steps": 0, "eval_steps": 0, "learning_rate": 1e-3,
        **({"model_family": "unet", "diff2flow_enabled": True, "twinflow_allow_diff2flow": True}
           if family == "sd15" else {}),
    } | changes  # fmt: skip
    return read_config(None, {name: value for name, value in chosen.items() if value is not None})


def quiet() -> Console:
    """A console that keeps what is said; `export_text()` gives it."""
    return Console(record=True, width=200, file=open(os.devnull, "w"), force_terminal=False)


def weights(root: Path) -> tuple[int, dict[str, Any]]:
    """Step and shared state of a run's latest checkpoint."""
    path = latest_checkpoint(root)
    assert path is not None
    tree = read_checkpoint(path)
    return tree["ranks"][0]["extra"]["step"], tree["shared"]


def same(a: Any, b: Any) -> bool:
    """Equal in type and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        whole = a.shape == b.shape and a.dtype == b.dtype
        as_bytes = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b) if x.numel()]
        return whole and (not as_bytes or torch.equal(*as_bytes))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a.hex() == b.hex() if isinstance(a, float) else a == b


def forked(work: Callable[[], Any], kill_after_s: float | None = None, number: int = signal.SIGKILL) -> int:
    """Runs in a child, perhaps ended by a signal after some time; its exit code, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def copied(folder: Path, to: Path) -> Path:
    """A run's folder without what it wrote but its cache."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("checkpoint-*", "metrics.jsonl", ".checkpoints.lock"))
    return to
