"""What is done with the files in tests/data/earlier, by whoever wrote them and by the test that reads them.

All of it works in the folder that is current.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from helpers.toy import ToyNet
from safetensors.torch import load_file

from twinflow import EMATeacher, FrozenTeacher, StudentTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.lora import add_lora, load_lora
from twinflow.models import load
from twinflow.sampling import sample
from twinflow.scheduler import TwinFlowScheduler

STEPS = 3  # that the run had taken
COMFYUI = "comfyui_model.safetensors"
DRAWING = ("--prompt", "a red square", "--steps", "2", "--seed", "0", "--out")
TEACHERS = {
    "ema": lambda student: EMATeacher(student, 0.9), "frozen": FrozenTeacher, "student": StudentTeacher,
}  # fmt: skip


def tensors(name):
    return load_file(Path("expected") / name)


def records(kind, after=0):
    """Lines of the run's metrics, without what depends on the machine's speed and the time of day."""
    found = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "terms", "grad_norm", "learning_rate", "trajectory")
    return [{n: r[n] for n in kept if n in r} for r in found if r["kind"] == kind and r["step"] > after]


def lora(folder):
    """All that an export of a LoRA holds."""
    files = ("pytorch_lora_weights.safetensors", "twinflow_conditioning.safetensors")
    return {name: value for file in files for name, value in load_file(Path(folder) / file).items()}


def with_lora():
    """The base model with the exported LoRA, as it would be trained on."""
    student = add_lora(load("base/transformer"), 2, conditioning="dual")
    load_lora(student, "exports/lora")
    return student


def whole():
    return load("exports/full")


def comfyui():
    return load(QwenImageTransformer2DModel.from_single_file(f"exports/comfyui/{COMFYUI}", config="exports/config"))


STUDENTS = {"lora": with_lora, "full": whole, "comfyui": comfyui}


def walked(name):
    """What `sample()` draws with a student from kept noise and conditions."""
    given = {n.removeprefix(f"{name}."): v for n, v in tensors("inputs.safetensors").items() if n.startswith(name)}
    return sample(STUDENTS[name](), given.pop("z"), given, steps=2, style="any")


def stock_drawn():
    """What a saved pipeline with our scheduler draws: the base's folders, and its own index and scheduler."""
    shutil.copytree("stock", shutil.copytree("base", "pipeline", dirs_exist_ok=True), dirs_exist_ok=True)
    pipe = DiffusionPipeline.from_pretrained("pipeline")
    assert type(pipe.scheduler) is TwinFlowScheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe(
        "a red square", num_inference_steps=2, guidance_scale=0.0, width=32, height=32, max_sequence_length=16,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    ).images  # fmt: skip


class ToyTraining:
    """The toy network in training with one kind of teacher."""

    def __init__(self, kind):
        self.net = ToyNet()
        self.teacher = TEACHERS[kind](self.net)
        self.criterion = TwinFlowLoss(TwinFlowConfig(recipe="partition"))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.parts = {
            "net": self.net, "teacher": self.teacher, "criterion": self.criterion, "optimizer": self.optimizer,
        }  # fmt: skip

    def step(self, batch, seed):
        generator = torch.Generator().manual_seed(seed)
        out = self.criterion.backward(self.net, *batch, teacher=self.teacher, generator=generator)
        self.optimizer.step(), self.optimizer.zero_grad()
        return float(out.loss)
