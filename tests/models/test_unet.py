"""UNets of epsilon and v-prediction as students: the bridge in every pass, held to stock samplers and closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.tiny_unet import KINDS, SHAPE, prompts, sd15_scheduler, tiny_model, tiny_unet

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.bridge import DiffusionToFlowBridge


class Calls:
    """Inputs of a model's calls and of its UNet's, in order."""

    def __init__(self, *models):
        self.asked, self.given = [], []
        for model in models:
            model.register_forward_pre_hook(lambda _, args: self.asked.append((args[0].clone(), *args[1:])))
            model.transformer.register_forward_pre_hook(lambda _, args: self.given.append(args))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_euler_steps_of_the_student_are_the_ddim_steps_of_the_stock_sampler(kind):
    """A DDIM step keeps x0 and eps, so it is an Euler step of the flow: same images, from noise to data."""
    unet, scheduler = tiny_unet().double(), sd15_scheduler(kind)
    model = tiny_model(kind, unet)
    cond, z = prompts(2, torch.float64), torch.randn(2, *SHAPE, dtype=torch.float64)
    scheduler.set_timesteps(5)
    stock = z
    for t in scheduler.timesteps:
        prediction = unet(stock, t, encoder_hidden_states=cond["prompt_embeds"])[0]
        stock = scheduler.step(prediction, t, stock).prev_sample
    sigmas = model.bridge.timesteps_to_sigma(torch.cat([scheduler.timesteps, torch.tensor([0])]))
    assert sigmas[0] == model.bridge.sigma_range[1]
    x = z * math.hypot(1 - sigmas[0], sigmas[0])
    for now, after in pairwise(sigmas):
        t = now.expand(2)
        x = x - (now - after) * model(x, t, t, cond)
    x_d = x / math.hypot(1 - sigmas[-1], sigmas[-1])
    torch.testing.assert_close(x_d, stock, rtol=0, atol=1e-4)  # the stock coefficients are float32
    assert (stock - z).abs().mean() > 0.3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_one_step_sample_of_pure_noise_is_the_stock_samplers(kind):
    """t = 1 lies beyond the table: unit noise is given to the last timestep, and the sample is the predicted x0."""
    unet, scheduler = tiny_unet().double(), sd15_scheduler(kind)
    cond, z = prompts(2, torch.float64), torch.randn(2, *SHAPE, dtype=torch.float64)
    scheduler.set_timesteps(1)
    prediction = unet(z, 999, encoder_hidden_states=cond["prompt_embeds"])[0]
    stock = scheduler.step(prediction, 999, z).pred_original_sample
    one, nothing = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    x_hat = z - tiny_model(kind, unet)(z, one, nothing, cond)
    torch.testing.assert_close(x_hat, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_velocity_is_continuous_where_the_table_ends(kind):
    model = tiny_model(kind, tiny_unet().double())
    x, cond = torch.randn(1, *SHAPE, dtype=torch.float64), prompts(1, torch.float64)
    for end in model.bridge.sigma_range:
        below, above = (model(x, t, t, cond) for t in torch.tensor([[end - 1e-9], [end + 1e-9]], dtype=torch.float64))
        torch.testing.assert_close(below, above, rtol=0, atol=1e-6)


class GaussianUNet(UNet2DConditionModel):
    """The optimal epsilon of data N(mean, spread^2); between timesteps log(abar / (1 - abar)) is interpolated."""

    def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None, return_dict=False):
        abar = sd15_scheduler().alphas_cumprod.double()
        snr, below = (abar / (1 - abar)).log(), timestep.long()
        snr = torch.lerp(snr[below], snr[(below + 1).clamp(max=999)], timestep - below)
        a, b = (snr.sigmoid().sqrt().view(-1, 1, 1, 1), (-snr).sigmoid().sqrt().view(-1, 1, 1, 1))
        return (b / (a**2 * SPREAD**2 + b**2) * (sample - a * MEAN),)


SPREAD, MEAN = torch.linspace(0.1, 2, 64).view(8, 8).double(), torch.linspace(-1, 1, 64).view(8, 8).double()


@torch.no_grad()
def errors(timesteps, t):
    """RMS errors of velocity and of one-step sample against the optimal ones, at times (B,)."""
    model = tiny_model("epsilon", tiny_unet(GaussianUNet).double(), timesteps=timesteps)
    s = t.view(-1, 1, 1, 1)
    x, z = MEAN + SPREAD * torch.randn(len(t), *SHAPE).double(), torch.randn(len(t), *SHAPE).double()
    x_t = (1 - s) * x + s * z
    from_mean, variance = x_t - (1 - s) * MEAN, (1 - s) ** 2 * SPREAD**2 + s**2
    optimal = s / variance * from_mean - MEAN - (1 - s) * SPREAD**2 / variance * from_mean
    error = model(x_t, t, t, prompts(len(t), torch.float64)) - optimal
    return error.square().mean().sqrt().item(), (s * error).square().mean().sqrt().item()


def test_the_default_timesteps_are_the_more_accurate():
    """Fractional timesteps err at least 5 times less than the nearest ones; with scale or time amiss it is 100 %."""
    low, high = DiffusionToFlowBridge(sd15_scheduler().alphas_cumprod).sigma_range
    t = torch.linspace(low, high, 999, dtype=torch.float64)
    velocity, sample = errors("fractional", t)
    nearest_velocity, nearest_sample = errors("nearest", t)
    assert velocity < 1e-3 and sample < 1e-4
    assert velocity < nearest_velocity / 5 and sample < nearest_sample / 5
    assert nearest_velocity < 1e-2
    assert tiny_model()._interpolate


@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_every_pass_of_a_planned_step_goes_through_the_bridge(recipe):
    student = tiny_model(conditioning="dual+sign")
    teacher = EMATeacher(student, 0.9)
    calls = Calls(student, teacher.module)
    x, cond, uncond = torch.randn(8, *SHAPE), prompts(8), prompts(8)
    criterion = TwinFlowLoss(TwinFlowConfig(recipe=recipe, enhanced_ratio=0.5))
    out = criterion(student, x, cond, uncond, teacher=teacher)
    plan = criterion.plan(out.draws, teacher=teacher)
    reached = {
        "partition": {"fake", "cfg", "rollout", "student", "rectify"},
        "all_terms": {"cfg", "rollout", "student", "velocity", "generate", "fake_velocity", "rectify"},
    }[recipe]
    assert {call.name for call in plan.calls} == reached
    assert {call.who for call in plan.calls} == {"student", "teacher"}
    assert len(plan.calls) == len(calls.asked) == len(calls.given)
    table = (1 - sd15_scheduler().alphas_cumprod.double()).sqrt()
    table = table / (table + sd15_scheduler().alphas_cumprod.double().sqrt())
    for call, (x_t, t, _, _), (given, timesteps) in zip(plan.calls, calls.asked, calls.given, strict=True):
        torch.testing.assert_close(t, torch.tensor(call.t), rtol=0, atol=1e-6)
        sigma = t.abs().double()
        assert timesteps.shape == t.shape and timesteps.min() >= 0 and timesteps.max() <= 999
        # The timestep's sigma is |t|, up to the table's ends.
        found = torch.lerp(table[timesteps.long()], table[timesteps.ceil().long()], timesteps.double().frac())
        torch.testing.assert_close(found, sigma.clamp(table[0], table[-1]), rtol=0, atol=1e-6)
        # The point is scaled from the flow's path to the diffusion's: the squares of its coefficients sum to 1.
        sigma = sigma.clamp(min=table[0]).view(-1, 1, 1, 1)
        torch.testing.assert_close(given, x_t / (sigma**2 + (1 - sigma) ** 2).sqrt().float())
    assert max(timesteps.max() for _, timesteps in calls.given) == 999  # and none is a sigma mistaken for a timestep


@torch.no_grad()
def test_nearest_timesteps_are_whole_and_the_point_is_theirs():
    """Scale and conversion use the alphas of the timestep that is fed, not those of the time that is asked."""
    model = tiny_model("v_prediction", timesteps="nearest")
    calls = Calls(model)
    t, x = torch.tensor([0.2003, 0.5001, 0.9]), torch.randn(3, *SHAPE)
    velocity = model(x, t, t, prompts(3))
    given, timesteps = calls.given[0]
    assert torch.equal(timesteps, model.bridge.sigma_to_timesteps(t).float())
    abar = sd15_scheduler().alphas_cumprod[timesteps.long()].view(-1, 1, 1, 1)
    torch.testing.assert_close(given, x * (abar.sqrt() + (1 - abar).sqrt()))
    prediction = model.transformer(given, timesteps, calls.asked[0][3]["prompt_embeds"])[0]
    flow = model.bridge.prediction_to_flow(prediction, given, timesteps.long(), prediction_type="v")
    assert torch.equal(velocity, flow)


@torch.no_grad()
def test_a_bfloat16_unet_is_told_the_same_times_and_converted_in_float32():
    wide, narrow = tiny_model(), tiny_model(unet=tiny_unet().bfloat16())
    calls = Calls(wide, narrow)
    t = torch.tensor([0.01, 0.31, 0.777, 0.935, 1.0])
    x, cond = torch.randn(5, *SHAPE), prompts(5)
    wide(x, t, t, cond)
    velocity = narrow.bfloat16()(x, t, t, cond)
    (_, expected), (given, timesteps) = calls.given
    assert timesteps.dtype == torch.float32 and torch.equal(timesteps, expected)
    assert given.dtype == torch.bfloat16 and velocity.dtype == torch.float32


@torch.no_grad()
def test_conditioning_is_told_timesteps_and_changes_nothing_at_first():
    unet = tiny_unet()
    plain, cond, x = tiny_model(unet=unet), prompts(4), torch.randn(4, *SHAPE)
    t, r = torch.tensor([0.3, 0.6, 0.9, 1.0]), torch.tensor([0.1, 0.0, 0.9, 0.0])
    before = plain(x, t, r, cond)
    conditioned = tiny_model(unet=unet, conditioning="dual")
    torch.testing.assert_close(conditioned(x, t, r, cond), before, rtol=1e-3, atol=1e-4)  # stock features are float32
    assert (before[0] - before[1]).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["dual", "midpoint", "sign", "dual+sign", "midpoint+sign"])
def test_the_student_learns_what_it_is_told(mode):
    """After a step the fake trajectory and the target time show in the output, each where its mode tells it."""
    model = tiny_model(conditioning=mode)
    x, cond = torch.randn(2, *SHAPE), prompts(2)
    t = torch.tensor([0.4, 0.8])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    (model(x, -t, -t, cond) - x).square().mean().backward()
    if "dual" in mode:
        (model(x, t, t / 2, cond) - x).square().mean().backward()
    for parameter in model.conditioning.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
    optimizer.step()
    with torch.no_grad():
        real, fake, jump = model(x, t, t, cond), model(x, -t, -t, cond), model(x, t, t * 0, cond)
    assert not torch.equal(real, fake)
    assert torch.equal(real, jump) == (mode == "sign")


def train_as_diffusion(unet, kind, x, cond, steps=100):
    scheduler, optimizer = sd15_scheduler(kind), torch.optim.Adam(unet.parameters(), lr=5e-3)
    for _ in range(steps):
        t, noise = torch.randint(1000, (len(x),)), torch.randn_like(x)
        target = noise if kind == "epsilon" else scheduler.get_velocity(x, noise, t)
        prediction = unet(scheduler.add_noise(x, noise, t), t, encoder_hidden_states=cond["prompt_embeds"])[0]
        (prediction - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_a_tiny_unet_trains(kind):
    """The loss of a fixed batch with fixed draws falls, for a UNet that was a diffusion model before."""
    unet, x, cond, uncond = tiny_unet(), torch.randn(4, *SHAPE), prompts(4), prompts(4)
    train_as_diffusion(unet, kind, x.repeat(3, 1, 1, 1), {"prompt_embeds": cond["prompt_embeds"].repeat(3, 1, 1)})
    student = tiny_model(kind, unet, conditioning="dual+sign")
    teacher, criterion = EMATeacher(student, 0.9), TwinFlowLoss(TwinFlowConfig(check_finite=True))
    draws = criterion.draw(x)
    assert draws.roles == ("e2e", "mul", "any", "adv")
    optimizer, losses = torch.optim.Adam(student.parameters(), lr=1e-3), []
    for _ in range(30):
        out = criterion(student, x, cond, uncond, teacher=teacher, draws=draws)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert sum(losses[-5:]) / 5 < 0.95 * losses[0], losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timesteps", ["fractional", "nearest"])
def test_velocity_and_gradient_are_finite_at_every_time(kind, timesteps):
    model = tiny_model(kind, conditioning="dual+sign", timesteps=timesteps)
    low, high = model.bridge.sigma_range
    ends = [0.0, 1e-7, low, 0.5, high, 1 - 1e-7, 1.0]
    t = torch.tensor(ends + [-end for end in ends])
    velocity = model(torch.randn(len(t), *SHAPE), t, t * 0, prompts(len(t)))
    velocity.square().mean().backward()
    assert torch.isfinite(velocity).all() and velocity.abs().max() < 100
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
