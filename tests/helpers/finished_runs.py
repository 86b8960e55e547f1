"""Runs that have ended, for the tests of the commands that come after training: real parts, a step or two."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from helpers.family_batches import make_batch
from helpers.tiny_pipelines import image_size, saved_pipeline

from twinflow.objective.loss import TwinFlowLoss
from twinflow.train.checkpoint.checkpoint import write_checkpoint
from twinflow.train.checkpoint.run_state import RunState
from twinflow.train.config.resolve import read_config
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.model.student import build_student, build_teacher

_BRIDGE = {"model_family": "unet", "diff2flow_enabled": True, "twinflow_allow_diff2flow": True}


def finished_run(root: Path, family: str = "sd3", steps: int = 2, **changes: object) -> Path:
    """A run's folder, with a checkpoint after each step; weights and average are far apart."""
    height, width = image_size(family)
    given = {
        "pretrained_model_name_or_path": str(saved_pipeline(family)), "output_dir": str(root), "mixed_precision": "no",
        "lora_rank": 2, "use_ema": True, "ema_decay": 0.5, "twinflow_enabled": True, "twinflow_target_step_count": 2,
        "instance_data_dir": "images", "validation_resolution": f"{width}x{height}",
        **(_BRIDGE if family == "sd15" else {}), **changes,
    }  # fmt: skip
    settings = read_config(None, {name: value for name, value in given.items() if value is not None})
    root.mkdir(parents=True, exist_ok=True)
    RunFolder(root).config.write_text(settings.to_json())
    student = build_student(settings, saved_pipeline(family))
    teacher = build_teacher(settings, student)
    criterion = TwinFlowLoss(settings.objective)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1 if settings.model_type == "lora" else 0.01)
    generator = torch.Generator().manual_seed(1)
    state = RunState(student, teacher, criterion, optimizer, None, {"steps": generator}, None, {"step": 0})
    for step in range(1, steps + 1):
        criterion.backward(student, *make_batch(family, student, 2), teacher=teacher, generator=generator)
        optimizer.step(), optimizer.zero_grad()
        state.extra["step"] = step
        write_checkpoint(root, step, state.collect())
    return root


@functools.cache
def kept_run(family: str = "sd3") -> Path:
    """A run of the family, made once per process and removed at its exit; only for reading."""
    return finished_run(_folder() / family, family)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="twinflow-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
