"""Tiny students of every family and a UNet, adapters as after training, for the tests of recomputation."""

import torch
from helpers.batches import gradients
from helpers.family_batches import make_batch, make_student
from helpers.tiny_unet import SHAPE, prompts, tiny_model

from twinflow.lora import add_lora

T, R, RANK = torch.tensor([0.9, 0.31]), torch.tensor([0.2, 0.31]), 2


def student_and_batch(family, lora=False, rows=2):
    """A student told both times, adapters as after training."""
    if family == "unet":
        student = tiny_model(conditioning="dual")
        batch = torch.randn(rows, *SHAPE), prompts(rows), prompts(rows)
    else:
        student = make_student(family, "dual")
        batch = make_batch(family, student, rows)
    if lora:
        add_lora(student, RANK)
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
    return student, batch


def step(student, batch):
    out = student(batch[0], T, R, batch[1])
    (out * out.detach().cos()).sum().backward()
    return out.detach(), gradients(student)
