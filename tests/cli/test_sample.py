"""`twinflow sample`: the same image for the same weights and seed, by the stock pipeline, and what its file says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.finished_runs import finished_run, kept_run
from helpers.tiny_pipelines import saved_pipeline
from PIL import Image
from safetensors.torch import load_file

import twinflow
from twinflow.cli import main
from twinflow.formats.manifest import MANIFEST
from twinflow.models import FAMILIES
from twinflow.pipelines.generator import ImageGenerator
from twinflow.train.checkpoint.checkpoint import TENSORS


def drawn(capsys, source, *arguments, out):
    """The files that the command writes, by its own word."""
    assert main(["sample", str(source), "--prompt", "a red fox", "--out", str(out), *arguments]) == 0
    return [Path(line) for line in capsys.readouterr().out.split("\n") if line]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def stock(export, **options):
    """The pipeline with an export, without the command."""
    return twinflow.attach(DiffusionPipeline.from_pretrained(saved_pipeline("sd3")), export, **options)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Family -> an export of its run."""
    found = {}
    for family in ("sd3", "qwen_image", "sana"):
        found[family] = tmp_path_factory.mktemp(family) / "export"
        assert main(["export", str(kept_run(family)), "--out", str(found[family])]) == 0
    return found


@pytest.mark.parametrize("family", ["sd3", "qwen_image"])
def test_a_run_and_its_export_draw_the_same(family, exports, tmp_path, capsys):
    (of_run,) = drawn(capsys, kept_run(family), out=tmp_path / "a")
    (of_export,) = drawn(capsys, exports[family], out=tmp_path / "b")
    assert of_run.name == of_export.name == "a-red-fox-2steps-seed0.png"
    assert (pixels(of_run) == pixels(of_export)).all() and pixels(of_run).std() > 1
    (of_student,) = drawn(capsys, kept_run(family), "--student", out=tmp_path / "c")
    assert (pixels(of_student) != pixels(of_run)).any()


@pytest.mark.parametrize("style", ["few", "any"])  # of which the first draws fresh noise in each step
def test_the_image_is_what_attach_and_the_stock_pipeline_draw(style, exports, tmp_path, capsys):
    (path,) = drawn(capsys, exports["sd3"], "--seed", "3", "--steps", "4", "--style", style, out=tmp_path)
    expected = stock(exports["sd3"], style=style, seed=3)(
        "a red fox", num_inference_steps=4, guidance_scale=0.0, width=24, height=16,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert (pixels(path) == np.asarray(expected)).all()


def test_a_seed_is_an_image(exports, tmp_path, capsys):
    first = drawn(capsys, exports["sd3"], "--count", "3", "--seed", "5", out=tmp_path / "a")
    assert [path.name[-9:] for path in first] == ["seed5.png", "seed6.png", "seed7.png"]
    assert (pixels(first[0]) != pixels(first[1])).any()
    (again,) = drawn(capsys, exports["sd3"], "--seed", "6", out=tmp_path / "b")
    assert (pixels(again) == pixels(first[1])).all()


def test_files_keep_their_settings_and_replace_none(exports, tmp_path, capsys):
    arguments = ["--width", "32", "--height", "16", "--prompt", "ein Fuchs, größer als 你好"]
    first = drawn(capsys, exports["sd3"], *arguments, out=tmp_path)
    second = drawn(capsys, exports["sd3"], *arguments, out=tmp_path)
    assert [p.name for p in first] == ["a-red-fox-2steps-seed0.png", "ein-fuchs-größer-als-你好-2steps-seed1.png"]
    assert second[0].name == "a-red-fox-2steps-seed0-2.png" and len(list(tmp_path.iterdir())) == 4
    text = Image.open(first[1]).text
    assert text["prompt"] == "ein Fuchs, größer als 你好"
    assert (text["seed"], text["steps"], text["style"], text["guidance"]) == ("1", "2", "few", "0.0")
    assert (text["width"], text["height"]) == ("32", "16") and Image.open(first[1]).size == (32, 16)
    assert text["model"] == str(saved_pipeline("sd3")) and text["weights"] == f"EMA weights, {exports['sd3']}"
    assert text["software"].startswith("twinflow ")


def test_prompts_of_a_file(exports, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    found = drawn(capsys, exports["sd3"], "--prompts-file", str(tmp_path / "prompts.txt"), out=tmp_path / "a")
    assert [path.name.split("-2steps")[0] for path in found] == ["a-red-fox", "a-cat", "a-dog"]


@pytest.mark.parametrize("family", ["sd3", "qwen_image", "sana"])
def test_prompts_are_encoded_as_in_training(family, exports):
    generator = ImageGenerator(saved_pipeline(family), exports[family])
    pipe, seen = generator._pipe, []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["encoder_hidden_states"]), with_kwargs=True
    )
    prompt = "a very " + "long " * 600 + "prompt"
    generator.generate(prompt, seed=0, steps=1, size=(64, 32))
    encoded = FAMILIES[family].encode_prompt(generator.manifest, pipe, [prompt])["prompt_embeds"]
    torch.testing.assert_close(seen[0], encoded, atol=1e-4, rtol=1e-3)


def test_sizes_are_drawn_as_asked_for_not_as_the_nearest_that_a_pipeline_knows(exports):
    generator, seen = ImageGenerator(saved_pipeline("sana"), exports["sana"]), []
    generator._pipe.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    assert generator.generate("a fox", seed=0, steps=1, size=(96, 64)).size == (96, 64)
    assert seen == [(8, 12)]


def test_plain_flow_matching_is_drawn_as_stock_pipelines_draw(tmp_path, capsys):
    run = finished_run(
        tmp_path / "run", steps=1, twinflow_enabled=False, twinflow_target_step_count=None, validation_guidance=3.0,
        validation_num_inference_steps=5,
    )  # fmt: skip
    assert main(["export", str(run)]) == 0
    capsys.readouterr()
    (path,) = drawn(capsys, run, out=tmp_path / "a")
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline("sd3"))
    pipe.load_lora_weights(run / "export")
    expected = pipe(
        "a red fox", negative_prompt="", num_inference_steps=5, guidance_scale=3.0, width=24, height=16,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    assert (abs(pixels(path) - np.asarray(expected)) <= 1).all()
    assert Image.open(path).text["style"] == "the pipeline's own"


def test_what_few_step_weights_are_not_for_is_said(exports, tmp_path, capsys):
    arguments = ["--prompt", "a fox", "--steps", "5", "--guidance", "2", "--out", str(tmp_path)]
    assert main(["sample", str(exports["sd3"]), *arguments]) == 0
    said = capsys.readouterr().err
    assert "warning: few-step weights are trained for 1 to 4 steps, got 5" in said
    assert "warning: guidance is in the weights already; 2 more oversaturates" in said


def test_an_export_that_does_not_say_its_model(exports, tmp_path, capsys):
    export = shutil.copytree(exports["sd3"], tmp_path / "export")
    said = json.loads((export / MANIFEST).read_text())
    del said["usage"]
    (export / MANIFEST).write_text(json.dumps(said))
    assert main(["sample", str(export), "--prompt", "a fox"]) == 2
    assert "model must be given for an export that does not name" in capsys.readouterr().err
    size = ["--width", "24", "--height", "16"]
    (path,) = drawn(capsys, export, "--model", str(saved_pipeline("sd3")), *size, out=tmp_path / "a")
    (expected,) = drawn(capsys, exports["sd3"], out=tmp_path / "b")
    assert (pixels(path) == pixels(expected)).all()


MISTAKES = {
    "no prompt": ([], "prompt must be given (or prompts-file), got neither"),
    "empty prompt": (["--prompt", " "], "prompt must have words, got ' '"),
    "no steps": (["--prompt", "x", "--steps", "0"], "steps must be from 1 to 1000, got 0"),
    "no images": (["--prompt", "x", "--count", "0"], "count must be from 1 to 1000000, got 0"),
    "a seed below 0": (["--prompt", "x", "--seed", "-1"], "seed must be from 0 to "),
    "an odd size": (["--prompt", "x", "--width", "30"], "width must be a multiple of 4 pixels (such as 32), got 30"),
    "no such file": (["--prompts-file", "/none.txt"], "path must be a file that can be read, got /none.txt"),
    "no such device": (["--prompt", "x", "--device", "gpu"], "device must be one of this machine's, got 'gpu'"),
    "no GPU": (["--prompt", "x", "--device", "cuda:64"], "device must be one of this machine's, got 'cuda:64'"),
    "no model": (["--prompt", "x", "--model", "/none"], "model must be a folder that exists or a hub name as"),
    "another model": (
        ["--prompt", "x", "--model", str(saved_pipeline("qwen_image"))], "pipe must be of family sd3, got qwen_image",
    ),
    "weights of an export": (["--prompt", "x", "--student"], "ema, student and checkpoint must be absent for an"),
    "a file for a folder": (["--prompt", "x", "--out", __file__], f"out must be a folder, got the file {__file__}"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_have_a_line_and_status_two(name, exports, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    assert main(["sample", str(exports["sd3"]), *arguments]) == 2
    *before, line = capsys.readouterr().err.strip().split("\n")
    assert line.startswith(f"twinflow sample: {message}") and len(before) <= 1
    assert not list(tmp_path.rglob("*.png"))


def test_damaged_files_have_a_line_and_status_two(exports, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(kept_run(), tmp_path / "run")
    for path in run.glob(f"checkpoint-*/{TENSORS}"):
        path.write_bytes(path.read_bytes()[:-1])
    lora = shutil.copytree(exports["sd3"], tmp_path / "lora")
    next(lora.glob("pytorch*.safetensors")).write_bytes(b"pickle")
    model = shutil.copytree(saved_pipeline("sd3"), tmp_path / "model")
    for path in model.glob("vae/*.safetensors"):
        path.write_bytes(b"pickle")
    pickled = shutil.copytree(saved_pipeline("sd3"), tmp_path / "pickled")
    for path in pickled.glob("vae/*.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    for source, arguments, message in (
        (run, [], "run must have a whole checkpoint, got checkpoint-000002 is passed over: "),
        (lora, [], f"{lora / 'pytorch_lora_weights.safetensors'} must be a whole safetensors file"),
        (exports["sd3"], ["--model", str(model)], "model must be a diffusers pipeline that loads, got "),
        (exports["sd3"], ["--model", str(pickled)], "model must be a diffusers pipeline that loads, got "),
        (tmp_path / "none", [], "RUN_OR_EXPORT must be a folder that exists, got "),
    ):
        assert main(["sample", str(source), "--prompt", "a fox", *arguments]) == 2
        assert capsys.readouterr().err.strip().split("\n")[-1].startswith(f"twinflow sample: {message}")
