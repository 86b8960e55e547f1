"""Teachers made before the student is moved, and teachers that move at every micro-batch of a step."""

import copy
import warnings

import pytest
import torch
from helpers.batches import move
from helpers.family_batches import make_batch, make_student
from helpers.teacher_cases import answer
from torch import nn

from twinflow import EMATeacher, FrozenTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.lora import add_lora

CRITERION = TwinFlowLoss(TwinFlowConfig(enhanced_ratio=0.0, adversarial=False))


class Net(nn.Module):
    """A student with a buffer, of any dtype."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x_t, t, r, cond):
        joined = torch.cat([x_t.to(self.scale.dtype), t[:, None].to(self.scale), r[:, None].to(self.scale)], 1)
        return self.layer(joined) * self.scale


def moved_by_hand(student, to):
    """The state after two updates of a teacher that is made in the right place at once."""
    student = copy.deepcopy(student).to(to)
    other = EMATeacher(student, 0.9)
    other.update()
    change(student)
    other.update()
    return other.parameters()


@torch.no_grad()
def change(student):
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.add_(0.5)


@pytest.mark.parametrize("lora", [False, True])
def test_a_teacher_follows_its_student_to_another_dtype(lora):
    """As `student.to(device)` after the teacher was made: parameters keep their identity and change their data."""
    student = move(add_lora(make_student("sd3"), 2, conditioning="dual+sign")) if lora else Net()
    ema, frozen = EMATeacher(student, 0.9), FrozenTeacher(student)
    by_hand = moved_by_hand(student, torch.float64) if not lora else None
    student.to(torch.float64)
    ema.check(student)
    frozen.check(student)
    ema.update()
    change(student)
    ema.update()
    assert all(value.dtype == torch.float64 for value in ema._weights.targets.values())
    if by_hand is not None:
        for name, value in ema.parameters().items():
            torch.testing.assert_close(value.double(), by_hand[name], rtol=1e-6, atol=1e-6)
        x, t = torch.randn(4, 3, dtype=torch.float64), torch.rand(4)
        assert ema(x, t, t, None).dtype == frozen(x, t, t, None).dtype == torch.float64
    else:
        batch = make_batch("sd3", student, 4, torch.float64)
        assert answer(ema, batch).isfinite().all() and answer(frozen, batch).isfinite().all()


def test_an_average_keeps_its_width_where_the_student_is_narrowed():
    """bf16 increments would round to zero."""
    student = Net()
    teacher = EMATeacher(student, 0.9)
    student.to(torch.bfloat16)
    teacher.update()
    change(student)
    teacher.update()
    assert all(value.dtype == torch.float32 for value in teacher.parameters().values())
    assert all(value.dtype == torch.bfloat16 for value in teacher._weights.targets.values())
    for name, value in teacher.parameters().items():
        assert torch.equal(value.bfloat16(), teacher._weights.targets[name])
    x, t = torch.randn(4, 3), torch.rand(4)
    assert teacher(x, t, t, None).dtype == torch.bfloat16


def test_moving_within_a_step_is_said_once():
    """Two micro-batches of one step; nothing is said where the optimizer steps in between, or of a first call."""
    student, latents = Net(), torch.randn(4, 3)
    teacher = EMATeacher(student, 0.9)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for zero in (True, False, True):
            CRITERION(student, latents, teacher=teacher).loss.backward()
            CRITERION(student, latents, teacher=teacher, update_teacher=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=zero)
        CRITERION(student, latents, teacher=teacher).loss.backward()
    with pytest.warns(UserWarning, match="EMATeacher: it moves again .* pass update_teacher=False .* but the first"):
        CRITERION(student, latents, teacher=teacher).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CRITERION(student, latents, teacher=teacher)
