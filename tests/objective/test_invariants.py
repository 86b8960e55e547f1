"""What holds for every step: the fixed point, finite losses, evaluation that moves nothing, purity."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.batches import COND, DIM, EIGHT, TEACHERS, gradients, move, toy_batch, toy_draws, trained_pair, with_times
from helpers.toy import ToyNet, make_teacher
from torch import nn

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.objective.draws import draw_step


class Constant(nn.Module):
    """A velocity that does not depend on anything."""

    def __init__(self):
        super().__init__()
        self.velocity = nn.Parameter(torch.randn(DIM, dtype=torch.float64))

    def forward(self, x_t, t, r, cond):
        return self.velocity.expand_as(x_t)


@pytest.mark.parametrize("loss", ["barron", "l2"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_a_constant_velocity_is_a_fixed_point(recipe, order, teacher, loss):
    """Data from which every path has the constant velocity: no loss and no gradient, at any order."""
    net = Constant()
    shares = dict.fromkeys(("e2e", "mul", "any", "one"), 1)
    options = dict(estimate_order=order, loss=loss, rectify_weight=0.5, shares=shares)
    config = TwinFlowConfig(recipe=recipe, adversarial=recipe == "all_terms", **options)
    roles = ("e2e", "mul", "any", "one", "any", "mul") if recipe == "partition" else None
    _, cond, uncond = toy_batch(6, torch.float64)
    draws = toy_draws(config, torch.zeros(6, DIM, dtype=torch.float64), roles)
    latents = draws.z - net.velocity.detach()
    out = TwinFlowLoss(config)(net, latents, cond, uncond, teacher=make_teacher(net, TEACHERS[teacher]), draws=draws)
    out.loss.backward()
    assert out.loss.item() < 1e-18
    assert net.velocity.grad.abs().max() < 1e-8
    moved = TwinFlowLoss(config)(net, latents + 0.1, cond, uncond, teacher=make_teacher(net, 0), draws=draws)
    assert moved.loss.item() > 1e-3, "the terms are there"


def awkward_times(draws, generator):
    """Puts random rows at t == r, one float32 ulp apart, at tiny t, at t = 1 and at r = 0; signs stay."""
    t, r = draws.t.abs(), draws.r.abs()
    choice = torch.randint(0, 8, t.shape, generator=generator)
    t = torch.where(choice == 0, t * 1e-30, t)
    t = torch.where(choice == 1, torch.ones_like(t), t)
    r = torch.where(choice == 2, torch.zeros_like(t), r.minimum(t))
    r = torch.where(choice == 3, t, r)
    r = torch.where(choice == 4, torch.nextafter(t, torch.zeros_like(t)), r)
    t = torch.where(choice == 5, torch.zeros_like(t), t)
    r = r.minimum(t)
    if draws.roles is not None:
        adv = torch.tensor([role == "adv" for role in draws.roles])
        t, r = torch.where(adv, -t, t), torch.where(adv, -t, r)
    again = draws.t_rectify
    if again is not None:
        again = torch.where(torch.rand(again.shape, generator=generator) < 0.1, again.round(), again)
    return replace(draws, t=t, r=r, t_rectify=again)


def finite_steps(steps, rows, recipe, seed):
    generator = torch.Generator().manual_seed(seed)
    for k in range(steps):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[k % 3]
        config = TwinFlowConfig(recipe=recipe, estimate_order=1 + k % 3, loss=("barron", "l2")[k % 2],
                                data_free=k % 5 == 4, check_finite=True)  # fmt: skip
        student, teacher = trained_pair(list(TEACHERS)[k % 3])
        latents, cond, uncond = toy_batch(rows)
        roles = EIGHT * (rows // 8) if recipe == "partition" else None
        draws = draw_step(config, latents, roles, generator, 0)
        if k % 2:
            draws = awkward_times(draws, generator)
        out = TwinFlowLoss(config)(student, latents.to(dtype), cond, uncond, teacher=teacher, draws=draws)
        out.loss.backward()
        assert math.isfinite(out.loss.item()), f"step {k}"
        assert all(value.isfinite().all() for value in gradients(student).values()), f"step {k}"
        yield rows


@pytest.mark.parametrize("recipe, steps", [("partition", 40), ("all_terms", 10)])
def test_no_loss_of_many_random_draws_is_not_finite(recipe, steps):
    """bf16 and fp16 latents, t == r, one ulp apart, t = 0 and 1: 10^5 rows over the two recipes."""
    assert sum(finite_steps(steps, 2000, recipe, seed=0)) == 2000 * steps


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_no_loss_of_a_million_random_draws_is_not_finite(recipe, seed):
    assert sum(finite_steps(125, 1000, recipe, seed)) == 125_000


def test_bf16_latents_have_float32_times():
    """One ulp of bf16 below 1 is 0.004: times in the latents' dtype would make t == r."""
    seen = []

    class Watching(ToyNet):
        def forward(self, x_t, t, r, cond):
            seen.append((x_t.dtype, t.dtype, r.dtype))
            return super().forward(x_t.float(), t, r, cond)

    student = Watching(DIM, COND)
    latents, cond, uncond = toy_batch(8)
    config = TwinFlowConfig()
    draws = toy_draws(config, latents.bfloat16(), EIGHT)
    out = TwinFlowLoss(config)(student, latents.bfloat16(), cond, uncond, teacher=make_teacher(student, 0), draws=draws)
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}
    assert out.loss.dtype == torch.float32


def test_float64_times_stay_float64():
    seen = set()

    class Watching(ToyNet):
        def forward(self, x_t, t, r, cond):
            seen.update((t.dtype, r.dtype))
            return super().forward(x_t, t, r, cond)

    student = Watching(DIM, COND, dtype=torch.float64)
    batch = toy_batch(8, torch.float64)
    config = TwinFlowConfig()
    TwinFlowLoss(config)(student, *batch, teacher=make_teacher(student, 0), draws=toy_draws(config, batch[0], EIGHT))
    assert seen == {torch.float64}


@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_evaluation_moves_nothing(recipe):
    """Neither teacher, counter, gradients nor the global stream; the same loss as the call."""
    config = TwinFlowConfig(recipe=recipe)
    student = ToyNet(DIM, COND)
    teacher, criterion = EMATeacher(student, 0.9), TwinFlowLoss(config)
    criterion.draw(torch.zeros(3, DIM))
    teacher.update()
    move(student)
    batch = toy_batch(8)
    counter, shadow = criterion.state_dict(), teacher.state_dict()
    first = criterion.evaluate(student, *batch, teacher=teacher, generator=torch.Generator().manual_seed(1))
    again = criterion.evaluate(student, *batch, teacher=teacher, generator=torch.Generator().manual_seed(1))
    assert criterion.state_dict() == counter and teacher.updates == shadow["updates"]
    for name, value in teacher.parameters().items():
        assert torch.equal(value, shadow["shadow"][name])
    assert torch.equal(first.loss, again.loss) and not first.loss.requires_grad
    assert all(parameter.grad is None for parameter in student.parameters())
    out = criterion(student, *batch, teacher=teacher, draws=first.draws, update_teacher=False)
    assert torch.equal(out.loss.detach(), first.loss)


@pytest.mark.parametrize("by_micro_batch", [False, True])
@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_a_step_is_a_pure_function_of_weights_batch_and_draws(recipe, by_micro_batch):
    """Twice the same bits, and no tensor of the caller is written."""
    config = TwinFlowConfig(recipe=recipe, data_free=True)
    student, teacher = trained_pair("ema")
    batch = toy_batch(8)
    draws = toy_draws(config, batch[0], EIGHT if recipe == "partition" else None)
    given = [*batch, *(value for value in vars(draws).values() if isinstance(value, torch.Tensor))]
    before = [value.clone() for value in given]
    versions = [value._version for value in given]
    found = []
    for _ in range(2):
        criterion = TwinFlowLoss(config)
        arguments = dict(teacher=teacher, draws=draws, update_teacher=False)
        out = (criterion.backward if by_micro_batch else criterion)(student, *batch, **arguments)
        if not by_micro_batch:
            out.loss.backward()
        found.append([out.loss.detach(), *gradients(student).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
    assert versions == [value._version for value in given]


def test_given_draws_leave_the_counter():
    config = TwinFlowConfig()
    student, teacher = trained_pair("student")
    criterion, batch = TwinFlowLoss(config), toy_batch(8)
    before = criterion.state_dict()
    criterion(student, *batch, teacher=teacher, draws=with_times(
        toy_draws(config, batch[0], ("any",) * 8), [0.5] * 8, [0.2] * 8))  # fmt: skip
    assert criterion.state_dict() == before
    out = criterion(student, *batch, teacher=teacher)
    assert criterion.state_dict() != before and out.draws.roles is not None
