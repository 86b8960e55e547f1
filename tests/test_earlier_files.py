"""What commit 9a5d81f wrote still loads: its run goes on, its exports draw, its saved states continue.

The files are in tests/data/earlier and name each other by paths relative to it: all works in that folder.
What is merely loaded must be the same; what is computed may be rounded otherwise on another machine.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from helpers.toy import ToyNet
from PIL import Image
from safetensors.torch import load_file

import twinflow
from twinflow import EMATeacher, FrozenTeacher, StudentTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.cli import main
from twinflow.export import export
from twinflow.formats.manifest import read_tensors
from twinflow.lora import add_lora, load_lora
from twinflow.models import load
from twinflow.sampling import sample
from twinflow.scheduler import TwinFlowScheduler

DATA = Path(__file__).parent / "data" / "earlier"
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
    return {name: value for file in files for name, value in read_tensors(Path(folder) / file).items()}


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


@pytest.fixture(autouse=True)
def earlier(tmp_path, monkeypatch):
    """A copy of the files."""
    monkeypatch.chdir(shutil.copytree(DATA, tmp_path / "earlier"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_the_run_goes_on(capsys):
    before = records("step")
    assert main(["train", "config.json"]) == 0
    said = capsys.readouterr().out
    assert f"going on after step {STEPS}" in said and "done: 6 steps" in said and "encoding" not in said
    assert records("step")[:STEPS] == before and len(before) == STEPS
    expected = json.loads(Path("expected/records.json").read_text())
    for kind, wanted in expected.items():
        found = records(kind, STEPS)
        assert [r["step"] for r in found] == [r["step"] for r in wanted] and wanted
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine["terms"] == pytest.approx(theirs["terms"], rel=1e-3, abs=1e-5)
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
            assert np.allclose(mine.get("trajectory", 0), theirs.get("trajectory", 0), atol=1e-6)
    assert main(["export", "run", "--out", "of-run"]) == 0
    close(lora("of-run"), tensors("continued.safetensors"))


def test_the_run_is_exported_as_it_was():
    assert main(["export", "run", "--out", "of-run"]) == 0
    found, expected = lora("of-run"), lora("exports/lora")
    assert found.keys() == expected.keys() and all(torch.equal(found[n], v) for n, v in expected.items())
    said = [json.loads(Path(folder, "twinflow.json").read_text()) for folder in ("of-run", "exports/lora")]
    assert [Path(usage["usage"].pop("model")).name for usage in said] == ["base"] * 2 and said[0] == said[1]


def test_the_run_is_reported():
    assert main(["report", "run"]) == 0
    page = Path("run/report.html").read_text()
    assert all(text in page for text in ("a red square", "data:image/", "real_velocity"))


@pytest.mark.parametrize("source, picture", [("run", "lora"), ("exports/lora", "lora"), ("exports/full", "full")])
def test_run_and_exports_draw(source, picture, monkeypatch):
    """With the fresh noise of that time, which came from the seed alone."""
    earlier = torch.Generator()
    monkeypatch.setattr("twinflow.scheduler.own_generators", lambda _, seed: [earlier.manual_seed(seed ^ 0x5457464C)])
    more = () if source == "run" else ("--model", "base", "--width", "32", "--height", "32")
    assert main(["sample", source, *DRAWING, "drawn", *more]) == 0
    found, expected = (np.array(Image.open(next(Path(f).glob("*.png")))).astype(int)
                       for f in ("drawn", f"expected/{picture}"))  # fmt: skip
    assert found.shape == (32, 32, 3) and abs(found - expected).max() <= 2 and expected.std() > 5


@pytest.mark.parametrize("name", STUDENTS)
def test_exports_come_back_as_students(name):
    close({name: walked(name)}, {name: tensors("walked.safetensors")[name]})


def test_an_export_replaces_an_earlier_one():
    before = load_file(f"exports/comfyui/{COMFYUI}")
    after = load_file(export(comfyui(), "exports/comfyui", format="comfyui") / COMFYUI)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_lora_attaches_and_plain_diffusers_refuses_it():
    pipe = DiffusionPipeline.from_pretrained("base")
    with pytest.raises(ValueError, match=r"call twinflow\.attach\(pipe, folder\)"):
        pipe.load_lora_weights("exports/lora")
    pipe = twinflow.attach(DiffusionPipeline.from_pretrained("base"), "exports/lora")
    assert type(pipe.scheduler) is TwinFlowScheduler and pipe.get_active_adapters() == ["twinflow"]


def test_a_saved_pipeline_has_its_scheduler():
    pipe, drawn = stock_drawn()
    settings = json.loads(Path("stock/scheduler/scheduler_config.json").read_text())
    assert {name: value for name, value in pipe.scheduler.config.items() if name in settings} == settings
    assert pipe.scheduler.config["style"] == "any" and pipe.scheduler.order == 2
    assert TwinFlowScheduler.from_pretrained("stock", subfolder="scheduler").config == pipe.scheduler.config
    close({"stock": drawn}, {"stock": tensors("walked.safetensors")["stock"]})


@pytest.mark.parametrize("kind", TEACHERS)
def test_saved_states_continue(kind):
    saved = torch.load(f"states/{kind}.pt", weights_only=True)
    training = ToyTraining(kind)
    for name, part in training.parts.items():
        part.load_state_dict(saved[name])
    assert training.criterion.state_dict() == saved["criterion"]
    losses = [training.step(saved["batch"], seed) for seed in (2, 3)]
    assert losses == pytest.approx(saved["next_losses"], rel=1e-4)
