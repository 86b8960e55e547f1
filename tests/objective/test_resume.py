"""A run that is saved and loaded in the middle continues bit for bit."""

import io

import pytest
import torch
from helpers.batches import COND, DIM, TEACHERS, toy_batch
from helpers.toy import ToyNet, make_teacher

from twinflow import TwinFlowConfig, TwinFlowLoss


class Run:
    """A training run of the toy network."""

    def __init__(self, recipe, teacher, dtype):
        torch.manual_seed(0)
        self.student = ToyNet(DIM, COND, dtype=dtype, dropout=0.1)
        self.teacher = make_teacher(self.student, TEACHERS[teacher])
        self.criterion = TwinFlowLoss(TwinFlowConfig(recipe=recipe))
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-2)
        self.generator = torch.Generator().manual_seed(1)
        self.losses = []

    def advance(self, steps, by_micro_batch=False):
        for k in range(steps):
            data = torch.Generator().manual_seed(len(self.losses))
            batch = [torch.randn(x.shape, generator=data).to(self.student.first.weight.dtype) for x in toy_batch(3)]
            arguments = dict(teacher=self.teacher, generator=self.generator)
            if by_micro_batch or k % 2:
                out = self.criterion.backward(self.student, *batch, micro_batch=2, **arguments)
            else:
                out = self.criterion(self.student, *batch, **arguments)
                out.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(out.loss.item())

    def parts(self):
        return {"student": self.student, "teacher": self.teacher, "criterion": self.criterion, "optim": self.optimizer}

    def save(self):
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {"generator": self.generator.get_state(), "global": torch.get_rng_state(), "losses": self.losses}
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return file

    def load(self, file):
        state = torch.load(file, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global"])
        self.losses = state["losses"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_a_resumed_run_equals_an_unbroken_one(recipe, teacher, dtype):
    """Student, teacher, criterion, optimizer, generator and the global stream (dropout), after 4 of 8 steps."""
    whole = Run(recipe, teacher, dtype)
    whole.advance(4)
    saved = whole.save()
    whole.advance(4)
    resumed = Run(recipe, teacher, dtype)
    if teacher == "frozen":
        resumed.advance(1)  # its weights are those of the first step, so the state must bring them
    resumed.load(saved)
    resumed.advance(4)
    assert resumed.losses == whole.losses
    assert resumed.criterion.state_dict() == whole.criterion.state_dict()
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)
    mine, theirs = whole.teacher.state_dict(), resumed.teacher.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if isinstance(value, dict):
            assert all(torch.equal(x, theirs[name][key]) for key, x in value.items())
        else:
            assert value == theirs[name]
