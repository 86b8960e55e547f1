"""Runs among names and folders as people have them, and in terminals of other encodings."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from helpers.tiny_pipelines import tiny_pipeline
from helpers.training_cases import photos, quiet, settings
from rich.console import Console

from twinflow.cli import main
from twinflow.train.data.cache import open_cache
from twinflow.train.data.prepare import items_of, unread
from twinflow.train.logging.console import Display
from twinflow.train.run import train

FLAGS = (
    "--resolution=32", "--lora_rank=2", "--max_train_steps=1", "--use_ema", "--twinflow_enabled", "--skip_bad",
    "--mixed_precision=no", "--validation_steps=0", "--eval_steps=0", "--memory_preset=batch",
)  # fmt: skip


def renamed(path: Path, name: bytes) -> None:
    os.rename(path, os.path.join(os.fsencode(path.parent), name))


def test_a_run_whose_names_are_no_text(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    data = photos(tmp_path / os.fsdecode(b"gr\xfcn") / "photos", 4)
    for suffix in (b".png", b".txt"):
        renamed(data / f"00{suffix.decode()}", b"caf\xe9" + suffix)
    renamed(data / "01.txt", b"lost-\xff.txt")
    renamed(data, b"f\xf6tos")
    monkeypatch.chdir(data.parent)
    tiny_pipeline("sd3", Path("model"))
    data, out = os.fsdecode(b"f\xf6tos"), "läufe"
    where = (f"--instance_data_dir={data}", f"--output_dir={out}", "--pretrained_model_name_or_path=model")
    assert main(["train", *where, *FLAGS]) == 0
    assert main(["train", *where, *FLAGS, "--max_train_steps=2"]) == 0
    assert [entry.name for entry in open_cache(Path(out) / "cache").entries] == ["02.png", "03.png", "caf\udce9.png"]
    assert main(["train", *where[::2], *FLAGS, "--output_dir=run-\udce4"]) == 2, "at once"
    assert main(["export", out]) == main(["report", out]) == 0
    said = terminal.buffer.getvalue().decode("ascii")
    assert "left out: 01.png: it has no caption" in said and "l\\xe4ufe" in said and "going on after step 1" in said


def test_what_a_run_reads_is_found_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline("sd3", tmp_path / "a" / "models" / "sd3")
    photos(tmp_path / "a" / "photos", 4)
    monkeypatch.chdir(tmp_path / "a")
    given = {"output_dir": "run", "instance_data_dir": "photos", "pretrained_model_name_or_path": "models/sd3"}
    short = {"max_train_steps": 1, "memory_preset": "batch", "mixed_precision": "no"}
    train(settings(tmp_path, **given | short), quiet())
    kept = json.loads(Path("run/config.json").read_text())
    assert kept["pretrained_model_name_or_path"] == str(tmp_path / "a" / "models" / "sd3")
    assert kept["instance_data_dir"] == str(tmp_path / "a" / "photos") and kept["output_dir"] == "run"
    monkeypatch.chdir("/")
    assert main(["export", str(tmp_path / "a" / "run"), "--out", str(tmp_path / "out")]) == 0
    saved = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert any(str(tmp_path / "a" / "models" / "sd3") in json.dumps(of) for of in saved)
    (tmp_path / "a").rename(tmp_path / "b")  # all of it goes elsewhere, and the same command goes on
    monkeypatch.chdir(tmp_path / "b")
    assert train(settings(tmp_path, **given | short | {"max_train_steps": 2}), quiet()) == 2


@pytest.mark.parametrize("out", ["photos/run", "photos"])
def test_what_a_run_writes_into_the_folder_of_its_images_is_no_data(tmp_path, out):
    data = photos(tmp_path / "photos", 4)
    given = settings(tmp_path, output_dir=str(tmp_path / out), cache_dir=str(data / "cache"))
    for place in (
        f"{out}/samples/base/01-2.png",
        f"{out}/wandb/run-1/a.png",
        f"{out}/logs/b.gif",
        "photos/cache/c.heic",
    ):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes((data / "00.png").read_bytes())
    assert [item.name for item in items_of(given)] == [f"{k:02}.png" for k in range(4)] and unread(given) == []


def test_a_message_is_written_out_where_the_terminal_lacks_its_letters():
    for encoding, said in (("ascii", "l\\xe4ufe \\udce9"), ("latin-1", "läufe \\udce9"), ("utf-8", "läufe \\udce9")):
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        Display(Console(file=file)).say("läufe \udce9")
        assert file.buffer.getvalue().decode(encoding) == f"{said}\n"
