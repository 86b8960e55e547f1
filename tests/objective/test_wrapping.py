"""The objective under autocast, in bf16, compiled, and with students that want to know their calls."""

import pytest
import torch
from helpers.batches import COND, DIM, EIGHT, gradients, toy_batch, toy_draws
from helpers.toy import ToyNet
from torch import nn

from twinflow import EMATeacher, FrozenTeacher, Plan, StudentTeacher, TwinFlowConfig, TwinFlowLoss

RECIPES = ("partition", "all_terms")


class Gemm(nn.Module):
    """A network of linear layers, which autocast runs in bf16."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(DIM + 2 + COND, 16), nn.Tanh(), nn.Linear(16, DIM))

    def forward(self, x_t, t, r, cond):
        return self.layers(torch.cat([x_t, t[:, None].to(x_t), r[:, None].to(x_t), cond.to(x_t)], 1)) + x_t


def run(config, student, teacher, batch, draws, by_micro_batch=False, autocast=False):
    criterion = TwinFlowLoss(config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if by_micro_batch:
            out = criterion.backward(student, *batch, teacher=teacher, draws=draws, micro_batch=3)
        else:
            out = criterion(student, *batch, teacher=teacher, draws=draws)
    if not by_micro_batch:
        out.loss.backward()
    return out.loss.detach(), gradients(student)


def assert_near(found, expected, tolerance):
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    for name, value in expected[1].items():
        error = (found[1][name] - value).norm() / value.norm()
        assert error < tolerance, f"{name}: {error:.3f}"


# Without the 1/delta of the rollout, so that bf16 noise is not amplified a hundredfold.
SMOOTH = dict(delta_t=1.0, loss="l2", target_clamp=None, rectify_loss="l2")


@pytest.mark.parametrize("by_micro_batch", [False, True])
@pytest.mark.parametrize("make", [StudentTeacher, FrozenTeacher, lambda net: EMATeacher(net, 0.9)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast(recipe, make, by_micro_batch):
    """Calls without gradient come first; what autocast keeps of their weights must not reach the student's call."""
    student = Gemm()
    config = TwinFlowConfig(recipe=recipe, **SMOOTH)
    batch = toy_batch(8)
    draws = toy_draws(config, batch[0], EIGHT if recipe == "partition" else None)
    found = run(config, student, make(student), batch, draws, by_micro_batch, autocast=True)
    expected = run(config, student, make(student), batch, draws)
    assert all(value.abs().sum() > 0 for value in found[1].values())
    assert found[0].dtype == torch.float32
    assert_near(found, expected, 0.05)


def test_autocast_keeps_no_weights_of_calls_without_gradient():
    """Where torch keeps weights that were cast without a graph, a later call with gradient would find them."""
    kept = []

    class Watched(Gemm):
        def forward(self, *inputs):
            kept.append((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))
            return super().forward(*inputs)

    student, batch = Watched(), toy_batch(8)
    draws = toy_draws(TwinFlowConfig(), batch[0], EIGHT)
    run(TwinFlowConfig(), student, EMATeacher(student, 0.9), batch, draws, autocast=True)
    assert set(kept) == {(False, False), (True, True)}


@pytest.mark.parametrize("latents", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("module", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_modules_and_latents(recipe, module, latents):
    """Loss and residuals in float32 whatever the latents and the module are; gradients in the module's dtype."""

    class Casting(Gemm):
        def forward(self, x_t, t, r, cond):
            return super().forward(x_t.to(module), t, r, cond)

    student = Casting().to(module)
    config = TwinFlowConfig(recipe=recipe, **SMOOTH)
    x, cond, uncond = toy_batch(8)
    draws = toy_draws(config, x, EIGHT if recipe == "partition" else None)
    teacher = EMATeacher(student, 0.9)
    found = run(config, student, teacher, (x.to(latents), cond, uncond), draws)
    assert found[0].dtype == torch.float32
    assert all(value.dtype == module for value in found[1].values())
    wide = Gemm()
    wide.load_state_dict(student.state_dict())
    expected = run(config, wide, EMATeacher(wide, 0.9), (x.to(latents).float(), cond, uncond), draws)
    assert_near((found[0], {name: value.float() for name, value in found[1].items()}), expected, 0.1)


@pytest.mark.parametrize("by_micro_batch", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_students(recipe, by_micro_batch):
    """The student compiled in place of itself, with teachers made from either; equal to eager."""
    student = ToyNet(DIM, COND)
    config = TwinFlowConfig(recipe=recipe)
    batch = toy_batch(8)
    draws = toy_draws(config, batch[0], EIGHT if recipe == "partition" else None)
    expected = run(config, student, StudentTeacher(student), batch, draws, by_micro_batch)
    student.calls = Nothing()
    compiled = torch.compile(student, backend="aot_eager")
    for teacher in (StudentTeacher(compiled), StudentTeacher(student), EMATeacher(student, 0.9)):
        loss, found = run(config, compiled, teacher, batch, draws, by_micro_batch)
        found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
        assert_near((loss, found), expected, 1e-4)


class Nothing:
    """A list of calls that keeps none, as Dynamo would recompile for each."""

    def append(self, call):
        pass


class Told(ToyNet):
    """Wants to know its calls."""

    def __init__(self, fails_at=None):
        super().__init__(DIM, COND)
        self.log, self.fails_at = [], fails_at

    def begin_step(self, plan):
        self.log.append(plan)

    def end_step(self):
        self.log.append("end")

    def forward(self, *inputs):
        self.log.append("call")
        if len(self.calls) == self.fails_at:
            raise RuntimeError("network")
        return super().forward(*inputs)


@pytest.mark.parametrize("by_micro_batch", [False, True])
def test_begin_step_and_end_step(by_micro_batch):
    student = Told()
    criterion = TwinFlowLoss()
    arguments = dict(teacher=StudentTeacher(student))
    (criterion.backward if by_micro_batch else criterion)(student, *toy_batch(8), **arguments)
    plan, *calls, end = student.log
    assert isinstance(plan, Plan) and end == "end"
    assert calls == ["call"] * len(plan.calls)


@pytest.mark.parametrize("fails_at", [0, 3, 5])
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: torch.compile(net, backend="eager", disable=True)])
def test_end_step_comes_when_the_network_raises(fails_at, wrap):
    student = Told(fails_at)
    with pytest.raises(RuntimeError, match="network"):
        TwinFlowLoss()(wrap(student), *toy_batch(8), teacher=StudentTeacher(student))
    assert isinstance(student.log[0], Plan) and student.log.count("end") == 1 and student.log[-1] == "end"


def test_end_step_comes_when_begin_step_raises():
    student = Told()
    student.begin_step = lambda plan: 1 / 0
    batch, before = toy_batch(8), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        TwinFlowLoss()(student, *batch, teacher=StudentTeacher(student), generator=torch.Generator())
    assert student.log == ["end"]
    assert torch.equal(torch.get_rng_state(), before)


def test_end_step_comes_when_backward_raises():
    student = Told()

    def failing(loss):
        raise RuntimeError("backward")

    with pytest.raises(RuntimeError, match="backward"):
        TwinFlowLoss().backward(student, *toy_batch(8), teacher=StudentTeacher(student), backward=failing)
    assert student.log[-1] == "end"


def test_a_plain_function_is_a_student():
    weight = torch.ones(DIM, requires_grad=True)

    def student(x_t, t, r, cond):
        return x_t * weight + t[:, None] - r[:, None]

    out = TwinFlowLoss()(student, *toy_batch(8), teacher=StudentTeacher(student))
    out.loss.backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(8, 3), (8, 2, 3), (8, 4, 2, 2), (8, 2, 2, 2, 2)])
def test_latents_of_any_rank(shape):
    scale = torch.ones((), requires_grad=True)

    def student(x_t, t, r, cond):
        return x_t * scale

    latents = torch.randn(shape)
    config = TwinFlowConfig(enhanced_ratio=0.0)
    teacher = StudentTeacher(student)
    out = TwinFlowLoss(config)(student, latents, teacher=teacher)
    flat = TwinFlowLoss(config)(student, latents.flatten(1), teacher=teacher, draws=flattened(out.draws))
    torch.testing.assert_close(out.loss, flat.loss)
    strided = latents.transpose(-1, 1).contiguous().transpose(-1, 1)
    assert torch.equal(TwinFlowLoss(config)(student, strided, teacher=teacher, draws=out.draws).loss, out.loss)


def flattened(draws):
    noises = {name: getattr(draws, name).flatten(1) for name in ("z", "z_fake", "z_rectify")}
    return type(draws)(**{**vars(draws), **noises})
