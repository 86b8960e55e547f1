"""Folders of real short runs, for the tests of whoever looks at them."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.batches import COND, DIM
from helpers.toy import ToyNet
from PIL import Image
from sklearn.datasets import load_digits

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.environment import describe_environment
from twinflow.train import read_config
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.logging.metrics_file import append_records
from twinflow.train.logging.step_metrics import StepMetrics

ROWS = 4
PROMPTS = ("the digit {0} & its <b>twin</b>", 'a second {0} </script><script>document.title="taken"</script>')


def records(steps: int, recipe: str = "partition", flow_only: bool = False) -> list[dict[str, Any]]:
    """What a toy network's steps of TwinFlow give, and an evaluation every ten; `flow_only`: without its times."""
    torch.manual_seed(0)
    student = ToyNet()
    teacher, criterion = EMATeacher(student, 0.9), TwinFlowLoss(TwinFlowConfig(recipe=recipe))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    metrics = StepMetrics(ROWS, torch.device("cpu"), twinflow=not flow_only)
    generator = torch.Generator().manual_seed(1)
    held = (torch.randn(ROWS, DIM), torch.randn(ROWS, COND), torch.zeros(1, COND))
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        x = torch.randn(ROWS, DIM, generator=generator) * 0.3 + 1
        out = criterion(student, x, torch.zeros(ROWS, COND), torch.zeros(1, COND), teacher=teacher,
                        generator=generator)  # fmt: skip
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()
        times = list(zip(out.draws.t.tolist(), out.draws.r.tolist(), strict=True))
        metrics.add(step, out.loss, out.terms, norm, 1e-3, times)
        if step % 10 == 0 or step == steps:
            found += metrics.flush()
            fixed = copy.deepcopy(criterion).evaluate(student, *held, teacher=teacher, generator=generator)
            terms = {name: float(value) for name, value in fixed.terms.items()}
            found.append({"kind": "evaluation", "step": step, "loss": float(fixed.loss), "terms": terms})
    return found


def start(step: int) -> dict[str, Any]:
    return {"kind": "start", "step": step, "at": "2025-03-01T12:00:00+00:00"}


def samples(run: RunFolder, step: int | None, weights: str = "ema", counts: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """Real digits as the images of a validation, with a grid."""
    folder, digits = run.samples_at(step), load_digits()
    folder.mkdir(parents=True)
    images = []
    for row, prompt in enumerate(PROMPTS):
        for count in counts:
            name = f"{row}-{count}.png"
            pixels = (digits.images[(step or 0) % 100 + row] * 15).astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").resize((32, 32)).save(folder / name)
            images.append({"file": name, "prompt": prompt.format(row), "steps": count, "style": "few",
                           "guidance": 0.0, "seed": 42})  # fmt: skip
    Image.open(folder / images[0]["file"]).resize((64, 64)).save(folder / "grid.png")
    record = {"step": step, "weights": weights, "width": 32, "height": 32, "images": images, "grid": "grid.png"}
    (folder / "samples.json").write_text(json.dumps(record))
    return record


def whole_run(root: Path, steps: int = 60) -> RunFolder:
    """A run that was resumed once, with samples, evaluations and everything else."""
    run = RunFolder(root)
    run.root.mkdir(parents=True)
    given = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-medium", "instance_data_dir": "photos",
             "use_ema": True, "twinflow_enabled": True, "twinflow_recipe": "partition", "max_train_steps": steps,
             "output_dir": str(root), "validation_prompts": PROMPTS[1], "learning_rate": 1e-3,
             "train_batch_size": ROWS, "twinflow_target_step_count": 2}  # fmt: skip
    run.config.write_text(read_config(None, given).to_json())
    run.environment.write_text(json.dumps(describe_environment()))
    found = records(steps)
    half = next(k for k, record in enumerate(found) if record["step"] > steps // 2)
    append_records(run.metrics, [start(0), *found[:half], start(steps // 2), *found[half:]])
    samples(run, None, "base", (30,))
    for step in range(20, steps + 1, 20):
        samples(run, step)
    return run
