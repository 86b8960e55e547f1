"""The three teachers of a student, and calls at fixed times."""

import torch

from twinflow import EMATeacher, FrozenTeacher, StudentTeacher

T, R = torch.tensor([0.9, 0.31, 0.5, 1.0]), torch.tensor([0.2, 0.31, 0.0, 0.7])
TEACHERS = {"ema": lambda student: EMATeacher(student, 0.9), "frozen": FrozenTeacher, "student": StudentTeacher}


def answer(network, batch, t=T, r=R):
    with torch.no_grad():
        return network(batch[0], t, r, batch[1])
