"""The scheduler: bit-equal to `sample()`, true to stock pipelines' calls, reproducible, savable."""

import copy
import json
import math

import pytest
import torch
from diffusers import DiffusionPipeline

from twinflow.sampling import sample
from twinflow.sampling.grid import sampling_grid
from twinflow.scheduler import TwinFlowScheduler


def velocity(x, t, r, cond=None):
    """A velocity that depends on state, time and target."""
    return torch.sin(2 * x) * t.view(-1, 1, 1, 1) + x * r.view(-1, 1, 1, 1) - 0.25 * t.view(-1, 1, 1, 1)


def drive(scheduler, z, generator=None):
    """The loop of a pipeline, the model asked at the scheduler's own times."""
    x = z
    for timestep in scheduler.timesteps:
        t, r = (torch.full((z.shape[0],), time) for time in scheduler.times())
        x = scheduler.step(velocity(x, t, r), timestep, x, generator=generator, return_dict=False)[0]
    return x


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("style", ["few", "any", "mul"])
@pytest.mark.parametrize("rho", [None, 0.0, 0.5, 1.0, "SDE"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("extrapolation", [0.0, 0.3])
def test_steps_by_hand_are_sample_bit_for_bit(style, rho, order, extrapolation):
    """Whatever the model is told as its timestep, the result is that of the times."""
    z = torch.randn(3, 2, 4, 4)
    options = dict(style=style, stochasticity=rho, order=order, extrapolation=extrapolation)
    variants = [
        (dict(), "t"),
        (dict(time_dist_ctrl=(1.17, 0.8, 1.1)), "midpoint"),
        (dict(shift=2.5, gap_start=0.0, gap_end=0.0), "midpoint"),
    ]
    for steps in (1, 2, 4):
        for more, told in variants:
            scheduler = TwinFlowScheduler(**options, **more, time_condition=told)
            scheduler.set_timesteps(steps)
            expected = sample(velocity, z, steps=steps, generator=seeded(), **options, **more)
            assert torch.equal(drive(scheduler, z, seeded()), expected)


def test_bfloat16_is_computed_in_float32_and_cast_back():
    z, output = torch.randn(2, 2, 4, 4).bfloat16(), torch.randn(2, 2, 4, 4).bfloat16()
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(4)
    result = scheduler.step(output, scheduler.timesteps[0], z, generator=seeded())
    s, end = sampling_grid(4)[:2]
    x_hat = z.float() - s * output.float()
    noise = torch.randn(z.shape, generator=seeded())
    assert result.prev_sample.dtype == result.pred_original_sample.dtype == torch.bfloat16
    assert torch.equal(result.pred_original_sample, x_hat.bfloat16())
    assert torch.equal(result.prev_sample, ((1 - end) * x_hat + end * noise).bfloat16())


def test_other_names_mean_the_same():
    mine = TwinFlowScheduler(gap_start=0.01, gap_end=0.2, stochasticity=0.5)
    theirs = TwinFlowScheduler(
        prediction_type="flow_matching", rfba_gap_start=0.01, rfba_gap_end=0.2, stochast_ratio=0.5
    )
    both = TwinFlowScheduler(gap_start=0.01, gap_end=0.2, rfba_gap_end=0.2, stochasticity=0.5, stochast_ratio=0.5)
    z = torch.randn(2, 2, 4, 4)
    for scheduler in (mine, theirs, both):
        scheduler.set_timesteps(3)
    assert torch.equal(drive(mine, z), drive(theirs, z)) and mine.sigmas.tolist() == both.sigmas.tolist()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("by_value", [False, True])
def test_image_to_image_starts_in_the_middle(order, by_value):
    """Half of 4 steps from noised data: the result is sample()'s over the two times that are left."""
    scheduler = TwinFlowScheduler(style="mul", order=order)
    scheduler.set_timesteps(4)
    start = 2 * scheduler.order
    if not by_value:
        scheduler.set_begin_index(start)
    timesteps = scheduler.timesteps[start:]
    data, noise = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    x = scheduler.scale_noise(data, timesteps[:1].repeat(2), noise)
    times = sampling_grid(4)[2:] if by_value else [0.5, 0.5 * 0.6 / 0.999, 0.0]
    torch.testing.assert_close(x, times[0] * noise + (1 - times[0]) * data)
    for timestep in timesteps:
        t, r = (scheduler.timesteps.new_full((2,), time) for time in (timestep / 1000, timestep / 1000))
        x = scheduler.step(velocity(x, t, r), timestep, x).prev_sample
    reference = TwinFlowScheduler(style="mul", order=order)
    reference.set_timesteps(sigmas=times[:-1])
    expected = drive(reference, times[0] * noise + (1 - times[0]) * data)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)


def test_inpainting_noises_to_the_time_that_follows():
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    data, noise = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    scheduler.step(noise, scheduler.timesteps[0], noise)
    following = torch.tensor([scheduler.timesteps[1]])
    s = sampling_grid(4)[1]
    torch.testing.assert_close(scheduler.scale_noise(data, following, noise), s * noise + (1 - s) * data)
    assert torch.equal(
        scheduler.add_noise(data, noise, following), scheduler.scale_noise(data, following, noise)
    )  # fmt: skip


def test_its_own_noise_is_reproducible_and_touches_no_global_stream():
    z = torch.randn(2, 2, 4, 4)
    state = torch.get_rng_state()

    def run(scheduler):
        scheduler.set_timesteps(4)
        return drive(scheduler, z)

    scheduler = TwinFlowScheduler(seed=3)
    first = run(scheduler)
    assert torch.equal(first, run(scheduler)) and torch.equal(first, run(copy.deepcopy(scheduler)))
    assert torch.equal(first, run(TwinFlowScheduler.from_config(scheduler.config)))
    assert not torch.equal(first, run(TwinFlowScheduler(seed=4)))
    scheduler.set_generator(seeded())
    assert torch.equal(run(scheduler), sample(velocity, z, steps=4, generator=seeded()))
    scheduler.set_generator(None)
    assert torch.equal(first, run(scheduler)) and torch.equal(torch.get_rng_state(), state)


def test_its_own_noise_is_not_the_initial_noise():
    for seed in range(3):
        scheduler = TwinFlowScheduler(seed=seed)
        scheduler.set_timesteps(2)
        z = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
        noise = fresh_noise(scheduler, z)
        assert correlation(z, noise) < 5 / math.sqrt(z.numel()) and 0.9 < noise.std() < 1.1


def fresh_noise(scheduler, z):
    """What the first of two steps adds where the data predicted are 0."""
    scheduler.set_timesteps(2)
    return scheduler.step(z / 0.999, scheduler.timesteps[0], z).prev_sample / 0.6


def correlation(a, b):
    return abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_image_has_its_own_noise_whatever_its_batch(dtype):
    scheduler = TwinFlowScheduler()
    z = torch.randn(3, 4, 8, 8).to(dtype)
    together = fresh_noise(scheduler, z)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert correlation(together[a], together[b]) < 0.25
    for row in range(3):
        assert torch.equal(fresh_noise(scheduler, z[row : row + 1]), together[row : row + 1])
    assert torch.equal(fresh_noise(TwinFlowScheduler(), z.flip(0).contiguous()), together.flip(0))
    assert correlation(fresh_noise(TwinFlowScheduler(seed=1), z), together) < 0.25


def test_later_noise_of_an_image_depends_on_its_first_sample_alone():
    """Devices round the states that follow; the noise must not change with them."""
    z, other = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    results = []
    for x in (other, other + 1e-6):
        scheduler = TwinFlowScheduler()
        scheduler.set_timesteps(4)
        scheduler.step(z, scheduler.timesteps[0], z)
        results.append(scheduler.step(x / scheduler.times()[0], scheduler.timesteps[1], x).prev_sample)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_no_noise_needs_no_reading_of_the_sample(monkeypatch):
    """One step, and walks without fresh noise: a GPU is not waited for."""
    monkeypatch.setattr("twinflow.scheduler.own_generators", lambda *_: pytest.fail("the sample was read"))
    for options, steps in ((dict(), 1), (dict(style="any"), 4), (dict(stochasticity=0.0), 4)):
        scheduler = TwinFlowScheduler(**options)
        scheduler.set_timesteps(steps)
        drive(scheduler, torch.randn(2, 2, 4, 4))


def test_a_list_of_generators_serves_a_row_each():
    z = torch.randn(3, 2, 4, 4)
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(4)
    together = drive(scheduler, z, [seeded(7), seeded(8), seeded(9)])
    for row in range(3):
        scheduler.set_timesteps(4)
        assert torch.equal(together[row : row + 1], drive(scheduler, z[row : row + 1], seeded(7 + row)))


def test_a_start_at_a_correction_stays_where_it_is():
    scheduler = TwinFlowScheduler(order=2, style="mul")
    scheduler.set_timesteps(3)
    x, output = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    result = scheduler.step(output, 1, x)
    assert torch.equal(result.prev_sample, x) and scheduler.step_index == 2
    torch.testing.assert_close(result.pred_original_sample, x - sampling_grid(3)[1] * output)


class OnlyScheduler(DiffusionPipeline):
    """A pipeline of a scheduler alone."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)


def test_a_pipeline_saves_and_loads_it(tmp_path):
    """The module path is what saved pipelines record."""
    OnlyScheduler(TwinFlowScheduler(style="any", gap_end=0.0, time_dist_ctrl=(1.17, 0.8, 1.1))).save_pretrained(
        tmp_path
    )
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["twinflow.scheduler", "TwinFlowScheduler"]
    loaded = OnlyScheduler.from_pretrained(tmp_path).scheduler
    assert type(loaded) is TwinFlowScheduler
    loaded.set_timesteps(3)
    assert loaded.sigmas.tolist() == pytest.approx(sampling_grid(3, 0.001, 0.0, (1.17, 0.8, 1.1)))
