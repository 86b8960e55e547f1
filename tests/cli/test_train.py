"""`twinflow train` on the command line: a config as users bring it, the dry run, mistakes in a line."""

import json

import pytest
from helpers.any_config import CONFIGS
from helpers.tiny_pipelines import saved_pipeline
from helpers.training_cases import CONFIG, photos
from hypothesis import HealthCheck, given
from hypothesis import settings as fuzz

from twinflow.cli import main
from twinflow.train.config.resolve import read_config
from twinflow.train.dry_run import step_plan


@pytest.fixture
def config(tmp_path):
    """The published config file, with a local SD3."""
    path = tmp_path / "config.json"
    known = CONFIG | {"pretrained_model_name_or_path": str(saved_pipeline("sd3")), "output_dir": str(tmp_path / "run")}
    path.write_text(json.dumps(known))
    photos(tmp_path / "photos", 8)
    return path


def test_the_published_config_trains(config, tmp_path, capsys):
    given = ["train", str(config), "--instance_data_dir", str(tmp_path / "photos"), "--resolution", "32"]
    assert main([*given, "--max_train_steps", "2", "--validation_steps", "1", "--logging-steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "sd3: LoRA of rank 64" in out and "TwinFlow (all_terms), 8 images, 4 rows a step, cpu" in out
    assert "step 2/2  loss " in out and "rcgm" in out and "real_velocity" in out and "done: 2 steps" in out
    assert "samples of the EMA weights, step 2" in out
    told = json.loads((tmp_path / "run" / "samples" / "step-000002" / "samples.json").read_text())
    assert {image["steps"] for image in told["images"]} == {1, 2, 4} and told["weights"] == "ema"
    assert {image["guidance"] for image in told["images"]} == {0.0}


@pytest.mark.parametrize("preset", ["80gb", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_dry_run_says_all_and_writes_nothing(config, tmp_path, capsys, preset):
    before = sorted(tmp_path.rglob("*"))
    given = ["train", str(config), "--dry-run", "--instance_data_dir", str(tmp_path / "photos"), "--resolution", "64"]
    assert (
        main([*given, "--validation_guidance", "3.5", "--twinflow_step_focus", "0.25", "--memory_preset", preset]) == 0
    )
    out = capsys.readouterr().out
    assert "* lora_rank = 64" not in out and "  lora_rank = 64" in out and "* use_ema = True" in out
    assert "step_focus 0.25: 25% of all rows take their times from the sampling grid of 2 step(s)" in out
    assert "! validation_guidance is 0.0 with TwinFlow" in out
    assert "8 images with captions; 4 rows a step on each process (1 at a time)" in out
    assert "step of 4 rows, recipe all_terms, order 2" in out and "rows with gradient: 8" in out
    shown = [line.split()[0] for line in out.splitlines() if len(line.split()) in (2, 3)]
    for name in (preset,) if preset != "auto" else ("batch", "rows", "80gb", "checkpoint", "40gb"):
        assert name in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_needs_no_data_and_no_network(config, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["train", str(config), "--dry-run", "--memory_preset", "40gb", "--resolution", "64"]) == 0
    assert "none yet: instance_data_dir must be given" in capsys.readouterr().out
    name = "stabilityai/stable-diffusion-3.5-large"
    assert main(["train", str(config), "--dry-run", "--pretrained_model_name_or_path", name]) == 0
    out = capsys.readouterr().out
    assert f"* pretrained_model_name_or_path = {name}" in out and "memory_preset auto takes the first of these" in out
    assert main(["train", str(config), "--dry-run", "--pretrained_model_name_or_path", "some/model"]) == 0
    assert "a model that is here or can be downloaded, got 'some/model'" in capsys.readouterr().out


def test_long_plans_are_cut():
    known = {"pretrained_model_name_or_path": "a/b", "use_ema": True, "twinflow_enabled": True}
    text = step_plan(read_config(None, known | {"gradient_accumulation_steps": 64}))
    assert "more calls" in text and len(text.splitlines()) < 30 and "rows with gradient: 128" in text


MISTAKES = {
    "no data": ([], "instance_data_dir must be given, a folder of images (or prompts_file), got neither"),
    "no such folder": (["--instance_data_dir", "nowhere", "--resolution", "32"],
                       "instance_data_dir must be a folder that exists"),
    "no such prompts": (["--prompts_file", "nowhere.txt", "--resolution", "32"],
                        "prompts_file must be a file that can be read"),
    "no such layer": (["--instance_data_dir", "photos", "--resolution", "32", "--lora_layers", "to_nowhere"],
                      "lora_layers must be names of layers of SD3Transformer2DModel, got 'to_nowhere'"),
    "base LoRA": (["--instance_data_dir", "photos", "--resolution", "32", "--base_lora", "nowhere.safetensors"],
                  "nowhere.safetensors"),
    "output is a file": (["--instance_data_dir", "photos", "--output_dir", "config.json"],
                         "output_dir must be a folder, got the file config.json"),
    "distillation": (["--distillation_method", "lcm", "--instance_data_dir", "photos"], "distillation_method"),
    "no EMA": (["--use_ema", "false"], "TwinFlow requires an EMA teacher; enable use_ema or set"),
    "another family": (["--model_family", "flux", "--instance_data_dir", "photos", "--resolution", "32"],
                       "model_family must be sd3 for the SD3Transformer2DModel"),
    "no such model": (["--pretrained_model_name_or_path", "./nowhere", "--instance_data_dir", "photos"],
                      "pretrained_model_name_or_path must be a folder that exists or a hub name"),
    "odd resolution": (["--instance_data_dir", "photos", "--resolution", "30"], "resolution must be"),
    "preset": (["--memory_preset", "41gb", "--instance_data_dir", "photos"], "memory_preset must be auto or 40gb"),
    "tracker": (["--report_to", "comet_ml", "--instance_data_dir", "photos"], "report_to"),
    "packed whole weights": (["--model_type", "full", "--memory_preset", "24gb"], "memory_preset must be one that"),
    "validation size": (["--instance_data_dir", "photos", "--resolution", "32", "--validation_resolution", "33x32"],
                        "validation_resolution must be"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(config, tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    arguments, wanted = MISTAKES[mistake]
    assert main(["train", str(config), *arguments]) == 2
    found = capsys.readouterr()
    line = found.err.strip()
    assert wanted in line and "\n" not in line and line.startswith("twinflow train: ") and "Traceback" not in line
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not list((tmp_path / "run" / "cache").glob("shard-*"))


def test_a_mistake_is_said_by_one_process(config, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", str(config)]) == 2
    assert capsys.readouterr().err == ""


def test_images_of_other_types_are_named(config, tmp_path, capsys):
    (tmp_path / "photos" / "moving.GIF").write_bytes(b"GIF89a")
    given = ["train", str(config), "--instance_data_dir", str(tmp_path / "photos"), "--resolution", "32"]
    assert main([*given, "--max_train_steps", "1", "--validation_steps", "0", "--eval_steps", "0"]) == 0
    out = capsys.readouterr().out
    assert "warning: images of these types are passed over: 1 .gif; those read are .png" in out
    assert "done: 1 step; next" in out


def test_a_loss_that_is_not_finite_is_exit_1(config, tmp_path, capsys):
    given = ["train", str(config), "--instance_data_dir", str(tmp_path / "photos"), "--resolution", "32"]
    wild = ["--learning_rate", "1000", "--max_grad_norm", "0", "--mixed_precision", "no", "--model_type", "full"]
    assert main([*given, *wild, "--validation_steps", "0", "--eval_steps", "0"]) == 1
    assert "not finite" in capsys.readouterr().err


def test_a_config_may_ask_for_the_traceback(config, capsys):
    config.write_text(json.dumps(json.loads(config.read_text()) | {"debug": True}))
    assert main(["train", str(config)]) == 2
    assert "Traceback" in capsys.readouterr().err


@fuzz(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIGS)
def test_no_config_shows_a_traceback(tmp_path, capsys, monkeypatch, found):
    """Whatever a file holds: a dry run, or one line and exit code 2."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "any.json"
    path.write_text(json.dumps({"pretrained_model_name_or_path": "nobody/nothing"} | found))
    status = main(["train", str(path), "--dry-run"])
    read = capsys.readouterr()
    assert status in (0, 2) and "Traceback" not in read.err
    assert (status == 2) == bool(read.err.strip()) and read.err.count("\n") <= 1
