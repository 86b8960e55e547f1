"""How an export says what it is drawn with."""

import json

import pytest

from twinflow.formats.generation_config import GenerationConfig
from twinflow.formats.manifest import MANIFEST, Manifest, read_manifest, write_manifest

MINE = Manifest("sd3", "dual", "lora", "ema", usage=GenerationConfig("stabilityai/sd3", 2, (768, 1024), 0.0))


def test_it_reads_back_as_written(tmp_path):
    write_manifest(MINE, tmp_path)
    assert read_manifest(tmp_path) == MINE


def test_a_folder_becomes_absolute_and_a_hub_name_stays(tmp_path, monkeypatch):
    (tmp_path / "models" / "sd3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert GenerationConfig("models/sd3", 1).to_dict()["model"] == str(tmp_path / "models" / "sd3")
    assert GenerationConfig("stabilityai/sd3", 1).to_dict()["model"] == "stabilityai/sd3"


def test_manifests_without_it_are_as_they_were(tmp_path):
    old = Manifest("sd3", "dual", "lora", "ema")
    write_manifest(old, tmp_path)
    assert list(json.loads((tmp_path / MANIFEST).read_text())) == [
        "family", "conditioning", "kind", "weights", "layout", "format",
    ]  # fmt: skip
    assert read_manifest(tmp_path) == old


def test_what_a_later_version_adds_is_passed_over(tmp_path):
    write_manifest(MINE, tmp_path)
    said = json.loads((tmp_path / MANIFEST).read_text())
    said["usage"]["sampler"] = "new"
    (tmp_path / MANIFEST).write_text(json.dumps(said))
    assert read_manifest(tmp_path) == MINE


@pytest.mark.parametrize(
    "saved, message",
    [
        (None, "usage must have model and steps, got None"),
        ([], "usage must have model and steps"),
        ({"model": "a/b"}, "usage must have model and steps"),
        ({"model": "", "steps": 2}, "model must be a pipeline's folder or hub name, got ''"),
        ({"model": ["a"], "steps": 2}, "model must be a pipeline's folder"),
        ({"model": "a/b", "steps": 0}, "steps must be an integer from 1 to 1000, got 0"),
        ({"model": "a/b", "steps": True}, "steps must be an integer"),
        ({"model": "a/b", "steps": 2, "size": [512]}, "size must be width and height"),
        ({"model": "a/b", "steps": 2, "size": "big"}, "size must be width and height"),
        ({"model": "a/b", "steps": 2, "size": [512, 10**9]}, "size must be width and height of 1 to 16384 pixels"),
        ({"model": "a/b", "steps": 2, "guidance": "4"}, "guidance must be a number >= 0, got '4'"),
        ({"model": "a/b", "steps": 2, "guidance": float("nan")}, "guidance must be a number >= 0, got nan"),
    ],
)
def test_a_strangers_values_are_refused_with_the_file_named(tmp_path, saved, message):
    write_manifest(MINE, tmp_path)
    said = json.loads((tmp_path / MANIFEST).read_text()) | {"usage": saved}
    (tmp_path / MANIFEST).write_text(json.dumps(said))
    with pytest.raises(ValueError, match=f"{MANIFEST}: {message}"):
        read_manifest(tmp_path)
