"""What commit 9a5d81f wrote still loads: its run goes on, its exports draw, its saved states continue.

The files are in tests/data/earlier; tests/helpers/write_earlier_files.py wrote them. What is merely loaded must be
the same; what is computed may be rounded otherwise on another machine.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.earlier_files import (
    COMFYUI,
    DRAWING,
    STEPS,
    STUDENTS,
    TEACHERS,
    ToyTraining,
    comfyui,
    lora,
    records,
    stock_drawn,
    tensors,
    walked,
)
from PIL import Image
from safetensors.torch import load_file

import twinflow
from twinflow.cli import main
from twinflow.export import export
from twinflow.scheduler import TwinFlowScheduler

DATA = Path(__file__).parent / "data" / "earlier"


@pytest.fixture(autouse=True)
def earlier(tmp_path, monkeypatch):
    """A copy of the files, which name each other by paths relative to it."""
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
def test_run_and_exports_draw(source, picture):
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
