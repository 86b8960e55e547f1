"""What export wrote comes back to go on training: whole models, LoRAs and the conditioning beside them."""

import re

import pytest
import torch
from helpers.family_batches import make_batch
from helpers.tiny_pipelines import tiny_transformer

from twinflow.export import export
from twinflow.lora import add_lora, load_lora
from twinflow.models import load


@torch.no_grad()
def moved(student):
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn_like(parameter)
    return student


def lora_student(mode):
    return add_lora(load(tiny_transformer("sd3")), 4, conditioning=mode)


@torch.no_grad()
def answer(student):
    torch.manual_seed(0)
    latents, cond, _ = make_batch("sd3", student, 4)
    return student(latents, torch.full((4,), 0.8), torch.full((4,), 0.3), cond)


@pytest.mark.parametrize("mode", [None, "dual", "dual+sign", "midpoint+sign"])
def test_a_whole_model(mode, tmp_path):
    student = moved(load(tiny_transformer("sd3"), conditioning=mode))
    again = load(export(student, tmp_path / "model"))
    assert (again.conditioning and again.conditioning.mode) == mode
    assert torch.equal(answer(again), answer(student))


@pytest.mark.parametrize("mode", [None, "dual", "sign", "midpoint", "dual+sign"])
def test_a_lora_and_its_conditioning(mode, tmp_path):
    student, other = moved(lora_student(mode)), moved(lora_student(mode))
    folder = export(student, tmp_path / "lora")
    assert not torch.equal(answer(other), answer(student))
    load_lora(other, folder)
    assert torch.equal(answer(other), answer(student))


def test_a_lora_of_another_mode_changes_nothing(tmp_path):
    folder = export(moved(lora_student("dual")), tmp_path / "lora")
    for mode in ("midpoint", "dual+sign", None):
        student = moved(lora_student(mode))
        before = answer(student)
        with pytest.raises(
            ValueError, match=f"load_lora: student must have conditioning 'dual'.*, got {re.escape(repr(mode))}"
        ):
            load_lora(student, folder)
        assert torch.equal(answer(student), before)


def test_a_lora_that_needs_its_second_embedder_is_no_base(tmp_path):
    folder = export(moved(lora_student("dual")), tmp_path / "lora")
    student = load(tiny_transformer("sd3"))
    with pytest.raises(ValueError, match=r"add_lora: base_lora must be a LoRA on its own, got .* second embedder"):
        add_lora(student, 4, base_lora=folder)
    assert student.conditioning is None and not hasattr(student.network, "peft_config")
