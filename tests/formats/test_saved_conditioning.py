"""Whole conditioned models, saved by diffusers and loaded back with the conditioning they were trained with."""

import re

import pytest
import torch
from helpers.family_batches import FAMILIES, make_batch, make_student, randomised
from helpers.teacher_cases import answer
from safetensors.torch import load_file, save_file

from twinflow.conditioning import MODES
from twinflow.formats.manifest import Manifest, write_manifest
from twinflow.models import load

WEIGHTS = "diffusion_pytorch_model.safetensors"


def saved(student, folder):
    """A conditioned student's whole transformer, as `save_pretrained` writes it, without anything beside it."""
    student.network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_with_its_conditioning(family, mode, tmp_path):
    """By its manifest, or by the names of its own weights where they tell the mode; asking for it again is fine."""
    student = randomised(make_student(family, mode))
    saved(student, tmp_path)
    batch = make_batch(family, student, 4)
    expected = answer(student, batch)
    inferred = mode in ("dual", "dual+sign")
    for asked in (mode, None) if inferred else (mode,):
        loaded = load(tmp_path, conditioning=asked)
        assert loaded.conditioning.mode == mode and torch.equal(answer(loaded, batch), expected)
    write_manifest(Manifest(student.family, mode, "full"), tmp_path)
    for asked in (mode, None):
        loaded = load(tmp_path, conditioning=asked)
        assert loaded.conditioning.mode == mode and torch.equal(answer(loaded, batch), expected)
    for other in set(MODES) - {mode}:
        wanted, got = (re.escape(repr(name)) for name in (mode, other))
        with pytest.raises(ValueError, match=f"load: conditioning must be {wanted}, with which .* got {got}"):
            load(tmp_path, conditioning=other)


def test_what_names_alone_do_not_tell(tmp_path):
    """A sign table belongs to two modes; a second embedder to no midpoint."""
    saved(make_student("sd3", "sign"), tmp_path / "sign")
    with pytest.raises(ValueError, match=r"given for .*, got None; its sign table was trained as 'sign' or 'midpoint"):
        load(tmp_path / "sign")
    saved(make_student("sd3", "dual"), tmp_path / "dual")
    for other in ("sign", "midpoint", "midpoint+sign", "dual+sign"):
        with pytest.raises(ValueError, match="load: conditioning must be 'dual', with which"):
            load(tmp_path / "dual", conditioning=other)


def test_saved_conditioning_that_does_not_fit(tmp_path):
    saved(make_student("sd3", "dual"), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "time_text_embed_2.timestep_embedder.linear_2.bias"
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"load: {name} must be of shape \(32,\), got \(31,\)"):
        load(tmp_path)
    tensors.pop(name)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"load: conditioning must have .* got a difference in \['{name}'\]"):
        load(tmp_path)
