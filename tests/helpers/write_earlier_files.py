"""Writes tests/data/earlier, as the code of commit 9a5d81f did, for tests/test_earlier_files.py.

Not run by the tests: files written anew would not be earlier ones.
`python tests/helpers/write_earlier_files.py FOLDER`.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from helpers.earlier_files import (
    DRAWING,
    STEPS,
    STUDENTS,
    TEACHERS,
    ToyTraining,
    lora,
    records,
    stock_drawn,
    walked,
)
from helpers.tiny_pipelines import tiny_pipeline, tiny_transformer
from PIL import Image
from safetensors.torch import save_file

from twinflow.cli import main
from twinflow.export import export
from twinflow.models import load
from twinflow.scheduler import TwinFlowScheduler

SMALL = dict(num_layers=1, num_attention_heads=1)
CONFIG = {
    "model_family": "sd3", "pretrained_model_name_or_path": "base", "output_dir": "run", "instance_data_dir": "images",
    "resolution": 32, "lora_rank": 2, "use_ema": True, "ema_decay": 0.5, "twinflow_enabled": True,
    "twinflow_target_step_count": 2, "twinflow_adversarial_enabled": True, "gradient_accumulation_steps": 2,
    "max_train_steps": 2 * STEPS, "learning_rate": 1e-3, "mixed_precision": "no", "eval_share": 0.2, "eval_steps": 3,
    "validation_steps": 3, "validation_prompts": ["a red square"], "checkpointing_steps": 3, "logging_steps": 1,
    "checkpoints_total_limit": 1,
}  # fmt: skip


def call(*arguments: str) -> None:
    assert main([*arguments]) == 0


def write_run() -> None:
    """A run that stopped halfway, the pipeline underneath, its images, and an export of it."""
    tiny_pipeline("sd3", Path("base"), num_layers=1)
    Path("images").mkdir()
    for number, name in enumerate(("red", "green", "blue", "yellow")):
        image = np.array(Image.new("RGB", (32, 32), "gray"))
        image[4 + 2 * number :, 8:] = Image.new("RGB", (1, 1), name).getpixel((0, 0))
        Image.fromarray(image).save(f"images/{number}.png")
        Path(f"images/{number}.txt").write_text(f"a {name} square")
    Path("config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    call("train", "config.json", "--max_train_steps", str(STEPS))
    call("export", "run", "--out", "exports/lora")
    change("exports/lora/twinflow.json", usage={"model": "base", "steps": 2, "size": [32, 32], "guidance": 0.0})
    change("run/environment.json", system="Linux")


def change(path: str, **values: object) -> None:
    """Replaces what a JSON file says of this machine."""
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | values, indent=1) + "\n")


def write_exports() -> None:
    """Two whole models, and what a pipeline with our scheduler has of its own."""
    export(load(tiny_transformer("sd3", caption_projection_dim=16, **SMALL), conditioning="dual+sign"), "exports/full")
    student = load(tiny_transformer("qwen_image", **SMALL))
    export(student, "exports/comfyui", format="comfyui")
    student.network.save_config("exports/config")
    pipe = DiffusionPipeline.from_pretrained("base")
    pipe.register_modules(scheduler=TwinFlowScheduler(style="any", order=2, shift=2.0, seed=5))
    pipe.save_pretrained("whole")
    shutil.copytree("whole/scheduler", "stock/scheduler")
    shutil.copy("whole/model_index.json", "stock")


def write_states() -> None:
    """States after two steps, and the losses of the two after."""
    Path("states").mkdir()
    for kind in TEACHERS:
        training = ToyTraining(kind)
        batch = torch.randn(8, 5), torch.randn(8, 3), torch.randn(8, 3)
        for seed in (0, 1):
            training.step(batch, seed)
        saved = {name: part.state_dict() for name, part in training.parts.items()} | {"batch": batch}
        saved = torch.load(saved_at(f"states/{kind}.pt", saved), weights_only=True)  # before the next steps change it
        torch.save(saved | {"next_losses": [training.step(batch, seed) for seed in (2, 3)]}, f"states/{kind}.pt")


def saved_at(path: str, value: object) -> str:
    torch.save(value, path)
    return path


def write_expected() -> None:
    """What all of it gives."""
    Path("expected").mkdir()
    inputs = {}
    for name in STUDENTS:
        student = STUDENTS[name]()
        inputs[f"{name}.z"] = torch.randn(2, 16, 8, 12)
        for part, width in student.condition_widths().items():
            inputs[f"{name}.{part}"] = torch.randn(2, *[7] * (part == "prompt_embeds"), width)
    save_file(inputs, "expected/inputs.safetensors")
    save_file({name: walked(name) for name in STUDENTS} | {"stock": stock_drawn()[1]}, "expected/walked.safetensors")
    call("sample", "exports/lora", *DRAWING, "expected/lora")
    call("sample", "exports/full", *DRAWING, "expected/full", "--model", "base", "--width", "32", "--height", "32")


def write_continued(folder: Path) -> None:
    """What the run measures and trains when it goes on, in a copy."""
    with tempfile.TemporaryDirectory() as copy:
        os.chdir(shutil.copytree(folder, copy, dirs_exist_ok=True))
        call("train", "config.json")
        call("export", "run", "--out", "of-run")
        found = {kind: records(kind, STEPS) for kind in ("step", "evaluation")}
        (folder / "expected" / "records.json").write_text(json.dumps(found, indent=1) + "\n")
        save_file(lora("of-run"), folder / "expected" / "continued.safetensors")
        os.chdir(folder)


def clean(folder: Path) -> None:
    """Leaves out what is not needed, and locks."""
    for name in ("whole", "pipeline"):
        shutil.rmtree(name)
    for path in [*folder.rglob(".checkpoints.lock"), *folder.rglob("cache/**/lock")]:
        path.unlink()


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    target.mkdir(parents=True)
    os.chdir(target)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    write_run(), write_exports(), write_states(), write_expected(), write_continued(target), clean(target)
