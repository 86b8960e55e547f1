"""The scheduler's grids: published defaults, what stock pipelines send, what a user asks for."""

import json
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import retrieve_timesteps

from twinflow.sampling.grid import sampling_grid
from twinflow.scheduler import TwinFlowScheduler


@pytest.mark.parametrize(
    "steps, times", [(1, [0.999]), (2, [0.999, 0.6]), (4, [0.999, 0.8327, 0.6663, 0.5]), (8, None)]
)
def test_published_grid_by_number_of_steps(steps, times):
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(num_inference_steps=steps)
    grid = sampling_grid(steps) if times is None else [*times, 0.0]
    assert scheduler.sigmas.tolist() == pytest.approx(grid, abs=1e-4)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * s for s in grid[:-1]], abs=0.1)
    assert scheduler.num_inference_steps == steps and scheduler.timesteps.dtype == torch.float32


def test_shift_is_honoured():
    scheduler = TwinFlowScheduler(shift=3.0, gap_start=0.0, gap_end=0.0)
    scheduler.set_timesteps(4)
    expected = [3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert scheduler.sigmas.tolist() == pytest.approx(expected)
    scheduler.set_shift(1.0)
    scheduler.set_timesteps(4)
    assert scheduler.shift == 1.0 and scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
def test_the_grid_stock_pipelines_send_is_no_wish(steps):
    stock = np.linspace(1.0, 1 / steps, steps)
    ours, stubborn = TwinFlowScheduler(), TwinFlowScheduler(use_pipeline_sigmas=True, shift=3.0)
    for sent in (stock, torch.linspace(1.0, 1 / steps, steps).tolist()):
        timesteps, count = retrieve_timesteps(ours, sigmas=sent, mu=0.8)
        assert timesteps.tolist() == pytest.approx([1000 * s for s in sampling_grid(steps)[:-1]]) and count == steps
    retrieve_timesteps(stubborn, sigmas=stock, mu=0.8)
    reference = FlowMatchEulerDiscreteScheduler(shift=3.0)
    retrieve_timesteps(reference, sigmas=stock)
    torch.testing.assert_close(stubborn.sigmas, reference.sigmas)


def test_other_sigmas_and_timesteps_are_used():
    scheduler = TwinFlowScheduler()
    timesteps, count = retrieve_timesteps(scheduler, sigmas=[0.9, 0.5, 0.2], mu=1.0)
    assert timesteps.tolist() == pytest.approx([900, 500, 200]) and count == 3
    assert scheduler.sigmas.tolist() == pytest.approx([0.9, 0.5, 0.2, 0.0])
    timesteps, count = retrieve_timesteps(scheduler, timesteps=[800, 300])
    assert timesteps.tolist() == [800, 300] and scheduler.sigmas.tolist() == pytest.approx([0.8, 0.3, 0.0])


def test_midpoint_times_are_what_the_model_gets():
    for style in ("few", "any", "mul"):
        scheduler = TwinFlowScheduler(style=style, time_condition="midpoint")
        scheduler.set_timesteps(4)
        grid = sampling_grid(4)
        targets = {"few": [0.0] * 4, "any": grid[1:], "mul": grid[:-1]}[style]
        assert scheduler.sigmas.tolist() == pytest.approx(grid)
        expected = [1000 * (s - r / 2) for s, r in zip(grid[:-1], targets, strict=True)]
        assert scheduler.timesteps.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2])
def test_timesteps_are_distinct(order):
    """0.9 - 0.6/2 = 0.6 is also the last midpoint, and a correction is asked where the next step starts."""
    scheduler = TwinFlowScheduler(style="any", time_condition="midpoint", order=order)
    scheduler.set_timesteps(sigmas=[0.9, 0.6])
    assert len(set(scheduler.timesteps.tolist())) == len(scheduler.timesteps) == 2 * order - (order == 2)
    assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps] == list(range(len(scheduler.timesteps)))
    assert scheduler.timesteps.tolist() == pytest.approx([600, 600] if order == 1 else [600, 300, 600], abs=1e-3)


def test_times_of_the_evaluation_to_come():
    scheduler = TwinFlowScheduler(style="any")
    scheduler.set_timesteps(2)
    z = torch.randn(1, 2, 4, 4)
    assert scheduler.times() == pytest.approx((0.999, 0.6))
    scheduler.set_begin_index(1)
    assert scheduler.times() == pytest.approx((0.5, 0.0))
    scheduler.set_begin_index(0)
    assert scheduler.times() == pytest.approx((0.999, 0.6))
    scheduler.step(z, scheduler.timesteps[0], z)
    assert scheduler.times() == pytest.approx((0.6, 0.0)) and scheduler.step_index == 1
    assert all(type(time) is float for time in scheduler.times())


@pytest.mark.parametrize("order", [1, 2])
def test_second_order_fits_the_progress_of_pipelines(order):
    """Stock loops count a step where (i + 1) % order == 0 or at the end, and skip max(len - n order, 0) first."""
    scheduler = TwinFlowScheduler(order=order)
    for steps in (1, 2, 5):
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps
        assert scheduler.order == order and len(timesteps) == order * steps - (order == 2)
        warm_up = max(len(timesteps) - steps * scheduler.order, 0)
        last = len(timesteps) - 1
        counted = [i for i in range(last + 1) if i == last or (i + 1 > warm_up and (i + 1) % scheduler.order == 0)]
        assert len(counted) == steps


def test_noise_per_row_and_training_times():
    """Before set_timesteps the grid is that of training, 1000 to 1."""
    scheduler = TwinFlowScheduler()
    data, noise = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    noised = scheduler.add_noise(data, noise, torch.tensor([250.0, 1000.0]))
    torch.testing.assert_close(noised[0], 0.25 * noise[0] + 0.75 * data[0])
    assert torch.equal(noised[1], noise[1])
    assert (scheduler.sigma_max, scheduler.sigma_min, len(scheduler)) == (1.0, 0.001, 1000)
    assert scheduler.init_noise_sigma == 1.0 and scheduler.scale_model_input(data, 0) is data


@pytest.mark.parametrize("form, mu", [("any", None), ("array", 0.8)])
def test_asked_for_sigmas_are_used_where_they_are_the_stock_grid(form, mu):
    """A list comes from the caller; only Z-Image's pipelines make one, and they send mu with it."""
    for asked in ([1.0, 0.5], (1.0, 0.5), torch.tensor([1.0, 0.5])):
        scheduler = TwinFlowScheduler(stock_sigmas=form)
        scheduler.set_timesteps(sigmas=asked, mu=mu)
        assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0]
    scheduler.set_timesteps(sigmas=np.array([1.0, 0.5]), mu=mu)
    assert scheduler.sigmas.tolist() == pytest.approx([0.999, 0.6, 0.0])


def test_the_list_that_z_image_sends():
    scheduler = TwinFlowScheduler(stock_sigmas="list")
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert scheduler.sigmas.tolist() == pytest.approx([0.999, 0.6, 0.0])
    scheduler.set_timesteps(sigmas=[1.0, 0.66, 0.33], mu=0.8)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.66, 0.33, 0.0])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps, done", [(2, 1), (4, 1), (4, 3), (10, 9), (28, 20)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_later_start_is_a_stock_schedulers(order, steps, done, shift):
    """The slice that a pipeline took before changes too; a start at 0 restores the grid."""
    scheduler = TwinFlowScheduler(order=order, shift=shift)
    scheduler.set_timesteps(steps)
    whole, taken = scheduler.sigmas.clone(), scheduler.timesteps[done * order :]
    scheduler.set_begin_index(done * order)
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    retrieve_timesteps(stock, sigmas=np.linspace(1.0, 1 / steps, steps))
    assert taken[0].item() == pytest.approx(stock.timesteps[done].item(), rel=1e-5)
    assert scheduler.times()[0] == pytest.approx(stock.sigmas[done].item(), rel=1e-5)
    assert len(taken) == order * (steps - done) - (order == 2) and torch.equal(
        taken, scheduler.timesteps[-len(taken) :]
    )
    assert all(before > after for before, after in pairwise(taken.tolist()))
    noised = scheduler.scale_noise(torch.zeros(1, 1), taken[:1], torch.ones(1, 1))
    assert noised.item() == pytest.approx(stock.sigmas[done].item(), rel=1e-5)
    scheduler.set_begin_index(0)
    assert torch.equal(scheduler.sigmas, whole)


def test_a_later_start_on_a_grid_that_was_asked_for_stays_on_it():
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.7, 0.2])
    scheduler.set_begin_index(1)
    assert scheduler.timesteps.tolist() == pytest.approx([900, 700, 200]) and scheduler.times()[0] == 0.7


def test_numpy_integers_are_integers():
    scheduler = TwinFlowScheduler(seed=np.int64(3), num_train_timesteps=np.int32(1000))
    scheduler.set_timesteps(np.int64(2))
    assert scheduler.num_inference_steps == 2 and type(scheduler.num_inference_steps) is int
    scheduler.set_begin_index(np.int64(0))
    z = torch.randn(1, 2, 4, 4)
    scheduler.step(z, np.int64(0), z)
    assert scheduler.step_index == 1 and type(scheduler.config.seed) is int
    assert json.loads(scheduler.to_json_string())["num_train_timesteps"] == 1000


def test_the_shift_of_another_scheduler_is_not_taken_over_in_silence():
    foreign = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    with pytest.warns(UserWarning, match=r"the other scheduler's shift of 3\.0 is not taken over.* Pass shift=3\.0"):
        scheduler = TwinFlowScheduler.from_config(foreign.config)
    assert scheduler.shift == scheduler.config.shift == 1.0
    scheduler.set_timesteps(2, mu=0.5)
    assert scheduler.sigmas.tolist() == pytest.approx([0.999, 0.6, 0.0])


def test_a_shift_that_was_asked_for_is_taken(tmp_path):
    """By name, from a configuration of our own, or by a dict without another scheduler's settings."""
    foreign = FlowMatchEulerDiscreteScheduler(shift=3.0)
    TwinFlowScheduler(shift=3.0).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scheduler in (
            TwinFlowScheduler.from_config(foreign.config, shift=3.0),
            TwinFlowScheduler.from_config(TwinFlowScheduler(shift=3.0).config),
            TwinFlowScheduler.from_pretrained(tmp_path),
            TwinFlowScheduler.from_config({"shift": 3.0}),
        ):
            assert scheduler.shift == 3.0
        assert TwinFlowScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=1.0).config).shift == 1.0
