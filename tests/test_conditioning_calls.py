"""One call of a conditioned student: the times of a guidance query, and times that outlive no call."""

import copy

import pytest
import torch
from helpers.family_batches import FAMILIES, features, make_batch, make_student, randomised
from torch import nn

from twinflow import EMATeacher, FrozenTeacher, StudentTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.conditioning import MODES
from twinflow.models import load

T = torch.tensor([0.9, 0.31, 0.5, 1.0])


@pytest.mark.parametrize("schedule", ["planned", "published"])
@pytest.mark.parametrize(
    "make", [lambda s: EMATeacher(s, 0.9), StudentTeacher, FrozenTeacher], ids=["ema", "student", "frozen"]
)
@pytest.mark.parametrize("mode, cfg_time, half", [
    ("midpoint", "published", True), ("midpoint", "t", False), ("midpoint+sign", "published", True),
    ("midpoint+sign", "t", False), ("dual", "t", False), ("dual", "published", False),
])  # fmt: skip
def test_the_time_of_a_guidance_query(mode, cfg_time, half, make, schedule):
    """t/2 as published, or t; what the network is told, counted in the features it gets. Rollouts are as they were."""
    student = make_student("sd3", mode, cfg_time=cfg_time)
    batch, teacher = make_batch("sd3", student, 4), make(student)
    seen = []
    holder = teacher._weights.module if make is not StudentTeacher else student
    for network in {id(m): m for m in (student, holder)}.values():
        embedder = network.transformer.get_submodule(student.time_embedder().path)
        embedder.register_forward_hook(lambda _module, args, _out: seen.append(args[0]))
    criterion = TwinFlowLoss(TwinFlowConfig())
    draws = criterion.draw(batch[0])
    plan = criterion.plan(draws, teacher=teacher, schedule=schedule)
    criterion(student, *batch, teacher=teacher, draws=draws, schedule=schedule)
    assert len(seen) == len(plan.calls)
    for call, given in zip(plan.calls, seen, strict=True):
        t, r = torch.tensor(call.t), torch.tensor(call.r)
        asked = t - r / 2 if "midpoint" in mode else t
        if call.name == "cfg":
            assert torch.equal(t, r)
            asked = t / 2 if half else t
        asked = asked.abs() if "sign" in mode else asked
        torch.testing.assert_close(given.double(), features(asked, 1000), rtol=0, atol=2e-4)
    assert {call.name for call in plan.calls} >= {"cfg", "rollout", "student"}


# Times are bound for one call.


class Failing(nn.Module):
    def forward(self, *args, **kwargs):
        raise RuntimeError("network")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_leaves_no_times_behind(family, mode):
    student = make_student(family, mode)
    x, cond, _ = make_batch(family, student, 4)
    expected = student(x, T, T / 2, cond)
    blocks = next(module for module in student.transformer.children() if isinstance(module, nn.ModuleList))
    last, blocks[-1] = blocks[-1], Failing()
    with pytest.raises(RuntimeError, match="network"):
        student(x, T, T / 2, cond)
    assert student.conditioning._current() is None
    blocks[-1] = last
    assert torch.equal(student(x, T, T / 2, cond), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformer_that_is_told_no_times(family, mode):
    """`dual` says what to call; the other modes compute what the stock transformer does, right for t > 0 and r = 0."""
    student, stock = randomised(make_student(family, mode)), make_student(family)
    x, cond, _ = make_batch(family, student, 4)
    alone = load(student.transformer)
    if "dual" in mode:
        message = rf"a transformer conditioned by {mode.replace('+', '.')} must be told both times, got only"
        with pytest.raises(ValueError, match=message):
            alone(x, T, T, cond)
    else:
        assert torch.equal(alone(x, T, T, cond), stock(x, T, T, cond))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_copy_is_a_student_of_its_own(family, mode):
    """Its hooks act on its own parameters and hear of its own times."""
    student = randomised(make_student(family, mode))
    x, cond, _ = make_batch(family, student, 4)
    other = copy.deepcopy(student)
    before = student(x, -T, -T / 2, cond)
    assert torch.equal(other(x, -T, -T / 2, cond), before)
    assert {id(p) for p in other.conditioning.parameters()} <= {id(p) for p in other.parameters()}
    with torch.no_grad():
        for parameter in other.conditioning.parameters():
            parameter.add_(1)
    assert torch.equal(student(x, -T, -T / 2, cond), before)
    if mode != "midpoint":
        assert not torch.equal(other(x, -T, -T / 2, cond), before)
    with student.conditioning.times(T, T):
        assert other.conditioning._current() is None
