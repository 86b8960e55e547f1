"""The three teachers of a student, calls at fixed times, and weights as after training."""

import torch

from twinflow import EMATeacher, FrozenTeacher, StudentTeacher

T, R = torch.tensor([0.9, 0.31, 0.5, 1.0]), torch.tensor([0.2, 0.31, 0.0, 0.7])
TEACHERS = {"ema": lambda student: EMATeacher(student, 0.9), "frozen": FrozenTeacher, "student": StudentTeacher}


@torch.no_grad()
def move(student, scale=0.1):
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter += scale * torch.randn_like(parameter)
    return student


def answer(network, batch, t=T, r=R):
    with torch.no_grad():
        return network(batch[0], t, r, batch[1])
