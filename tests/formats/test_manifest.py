"""The JSON beside saved weights, and files that are not what they should be."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from helpers.tiny_pipelines import tiny_transformer
from safetensors.torch import save_file

from twinflow.conditioning import MODES, conditioning_tensors
from twinflow.errors import ArgumentError
from twinflow.formats.manifest import (
    CONDITIONING,
    MANIFEST,
    Manifest,
    inferred_mode,
    put_conditioning,
    read_manifest,
    read_tensors,
    saved_conditioning,
    write_conditioning,
    write_manifest,
)
from twinflow.models import load

MINE = Manifest("sd3", "dual+sign", "lora", "ema")


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_manifest_reads_back_as_written(tmp_path, mode):
    mine = replace(MINE, conditioning=mode)
    write_manifest(mine, tmp_path)
    assert read_manifest(tmp_path) == mine
    assert mine.needs_conditioning == (mode in ("dual", "dual+sign"))


BAD = [
    *((text, "got one that cannot be read") for text in ("", '{"family": "sd3"', "\x00\xff")),
    ("[1]", "must hold a JSON object"),
    ("{}", "must be of format 1, got None"),
    ({"format": 2}, "must be of format 1, got 2"),
    ({"conditioning": "both"}, "conditioning must be one of None, dual, .*got 'both'"),
    ({"conditioning": ["dual"]}, "conditioning must be one of"),
    ({"kind": "lokr"}, "kind must be one of lora, full"),
    ({"weights": 1}, "weights must be one of student, ema"),
    ({"layout": "kohya"}, "layout must be one of diffusers, comfyui"),
    ({"family": None}, "family must be a name"),
    ({"more": 1}, "must hold family, .*more"),
]


@pytest.mark.parametrize("written, message", BAD)
def test_a_damaged_manifest_and_values_that_no_export_writes_are_named(tmp_path, written, message):
    assert read_manifest(tmp_path) is None
    text = written if isinstance(written, str) else json.dumps(asdict(MINE) | written)
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArgumentError, match=f"{MANIFEST}.*{message}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 40, -1, None])
def test_a_truncated_or_missing_safetensors_file_is_named(tmp_path, kept):
    path = tmp_path / "weights.safetensors"
    if kept is not None:
        save_file({"a": torch.ones(4)}, path)
        path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArgumentError, match=r"weights\.safetensors must be a whole safetensors file"):
        read_tensors(path)


def conditioned(mode):
    student = load(tiny_transformer("sd3"), conditioning=mode)
    with torch.no_grad():
        for parameter in student.conditioning.parameters():
            parameter.normal_()
    return student


@pytest.mark.parametrize("mode", MODES)
def test_conditioning_reads_back_and_a_mode_shows_in_its_names(tmp_path, mode):
    student = conditioned(mode)
    mine = conditioning_tensors(student.network)
    write_conditioning(mine, tmp_path)
    assert (tmp_path / CONDITIONING).exists() == (mode != "midpoint")
    saved = saved_conditioning(tmp_path, student.conditioning_roots())
    other = load(tiny_transformer("sd3"), conditioning=mode)
    put_conditioning(other.network, saved, "test")
    for name, value in conditioning_tensors(other.network).items():
        assert torch.equal(value, mine[name])
    if mode in ("sign", "midpoint+sign"):
        with pytest.raises(ValueError, match="sign table was trained as 'sign' or 'midpoint\\+sign'"):
            inferred_mode(saved, tmp_path)
    else:
        assert inferred_mode(saved, tmp_path) == (None if mode == "midpoint" else mode)


def test_other_names_or_shapes_are_named_and_nothing_is_copied():
    student = conditioned("dual+sign")
    mine = conditioning_tensors(student.network)
    before = {name: value.detach().clone() for name, value in mine.items()}
    other = {name: torch.zeros_like(value) for name, value in mine.items()}
    fewer = {name: value for name, value in other.items() if name != "time_sign_embed.weight"}
    with pytest.raises(ValueError, match=r"test: conditioning must have .*time_sign_embed\.weight"):
        put_conditioning(student.network, fewer, "test")
    with pytest.raises(ValueError, match=r"test: time_sign_embed\.weight must be of shape \(2, 32\), got \(2, 31\)"):
        put_conditioning(student.network, other | {"time_sign_embed.weight": torch.zeros(2, 31)}, "test")
    assert all(torch.equal(value, before[name]) for name, value in mine.items())
