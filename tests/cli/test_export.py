"""`twinflow export`: the right weights, where they go, and what it says."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.finished_runs import finished_run, kept_run
from helpers.tiny_pipelines import saved_pipeline

from twinflow.cli import main
from twinflow.formats.manifest import COMFYUI_LORA, CONDITIONING, LORA, read_manifest, read_tensors
from twinflow.train.checkpoint.checkpoint import read_checkpoint


def exported(folder):
    """Name within the transformer -> weight."""
    lora = {name.removeprefix("transformer."): value for name, value in read_tensors(folder / LORA).items()}
    return lora | read_tensors(folder / CONDITIONING)


def trained(run, average, step=2):
    """The same of a checkpoint."""
    shared = read_checkpoint(run / f"checkpoint-{step:06d}")["shared"]
    tensors = shared["teacher"]["state"]["shadow"] if average else shared["student"]
    found = {}
    for name, value in tensors.items():
        for part in ("transformer.", "base_model.model.", "default.", "ema."):
            name = name.replace(part, "", 1)
        found[name] = value
    return found


def assert_equal(mine, theirs):
    assert mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("family", ["sd3", "qwen_image"])
@pytest.mark.parametrize("flags, average", [([], True), (["--ema"], True), (["--student"], False)])
def test_the_weights_are_those_asked_for(family, flags, average, tmp_path, capsys):
    run = kept_run(family)
    assert main(["export", str(run), *flags, "--out", str(tmp_path / "out")]) == 0
    assert_equal(exported(tmp_path / "out"), trained(run, average))
    mine, other = exported(tmp_path / "out"), trained(run, not average)
    assert sum(torch.equal(value, other[name]) for name, value in mine.items()) < len(mine) / 2  # some are not trained
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: {'EMA' if average else 'student'} weights after 2 steps" in said
    assert f"draw with it: twinflow sample {tmp_path / 'out'}" in said and f"  {LORA}  " in said


def test_it_says_what_it_was_trained_on_and_for(tmp_path):
    run = finished_run(tmp_path / "run", steps=1, twinflow_target_step_count=3, validation_resolution="48x32")
    assert main(["export", str(run)]) == 0
    usage = read_manifest(run / "export").usage
    assert (usage.model, usage.steps, usage.size, usage.guidance) == (str(saved_pipeline("sd3")), 3, (48, 32), 0.0)


def test_an_earlier_checkpoint(tmp_path):
    assert main(["export", str(kept_run()), "--checkpoint", "checkpoint-000001", "--out", str(tmp_path)]) == 0
    assert_equal(exported(tmp_path), trained(kept_run(), True, 1))


def test_a_run_without_an_average_gives_the_student(tmp_path, capsys):
    run = finished_run(tmp_path, steps=1, use_ema=False, twinflow_allow_no_ema_teacher=True)
    assert main(["export", str(run)]) == 0
    assert "student weights after 1 step," in capsys.readouterr().out
    assert read_manifest(run / "export").weights == "student"
    assert main(["export", str(run), "--ema"]) == 2
    assert "ema must be False for a run without an average" in capsys.readouterr().err


def test_key_names_of_comfyui(tmp_path, capsys):
    assert main(["export", str(kept_run("qwen_image")), "--format", "comfyui", "--out", str(tmp_path)]) == 0
    assert read_tensors(tmp_path / COMFYUI_LORA) and "models/loras" in capsys.readouterr().out


def test_a_lora_and_its_frozen_base_as_one(tmp_path):
    other = finished_run(tmp_path / "base", steps=1, conditioning="midpoint")
    assert main(["export", str(other)]) == 0
    run = finished_run(
        tmp_path / "run", steps=1, base_lora=str(other / "export" / LORA), conditioning="midpoint", use_ema=True
    )
    assert main(["export", str(run), "--out", str(tmp_path / "alone")]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "merged"), "--merge-base"]) == 0
    alone, merged = (read_tensors(tmp_path / name / LORA) for name in ("alone", "merged"))
    name = next(name for name in alone if name.endswith("lora_A.weight"))
    assert (alone[name].shape[0], merged[name].shape[0]) == (2, 4)


def test_a_unet_goes_into_the_stock_pipeline(tmp_path, capsys):
    assert main(["export", str(finished_run(tmp_path, "sd15", steps=1, conditioning="midpoint"))]) == 0
    assert "draw with it: twinflow.sampling.sample()" in capsys.readouterr().out
    DiffusionPipeline.from_pretrained(saved_pipeline("sd15")).load_lora_weights(tmp_path / "export")
    assert main(["sample", str(tmp_path / "export"), "--prompt", "a fox"]) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert "cannot sample a UNet export" in line and "use twinflow.sampling.sample(" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--format", "comfyui"],
            "twinflow export: format 'comfyui' must have a student of qwen_image, z_image, got sd3",
        ),
        (["--format", "onnx"], "twinflow export: format must be one of diffusers, comfyui, got 'onnx'"),
        (["--merge-base"], "twinflow export: merge_base must be False for a student without a base_lora, got True"),
        (["--checkpoint", "checkpoint-000009"], "twinflow export: checkpoint must be latest, one of "),
        (["--model", "/none"], "twinflow export: model must be a folder that exists or a hub name as owner/name"),
        (["--out", __file__], "twinflow export: folder must be a folder, got the file "),
    ],
)
def test_mistakes_have_a_line_and_status_two(arguments, message, capsys):
    run = kept_run()
    capsys.readouterr()  # what making it said
    assert main(["export", str(run), *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith(message)


def test_folders_that_are_no_runs(tmp_path, capsys):
    config = json.loads((kept_run() / "config.json").read_text())
    (tmp_path / "empty").mkdir(), (tmp_path / "new").mkdir(), (tmp_path / "broken").mkdir()
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, message in (
        ("none", "run must be the folder of a run, got "),
        ("empty", "run must be what `twinflow train` wrote, got "),
        ("new", "run must have a whole checkpoint, got none in "),
        ("broken", "config must be JSON, got "),
    ):
        assert main(["export", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.strip().split("\n")
        assert line.startswith(f"twinflow export: {message}")
