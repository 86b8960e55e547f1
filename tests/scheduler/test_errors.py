"""Bad input to the scheduler gets a named error, and leaves the schedule where it was."""

import numpy as np
import pytest
import torch

from twinflow.scheduler import TwinFlowScheduler

NOT_SET = "Please call `set_timesteps` before running inference."
WRONG_LIST = "TwinFlowScheduler received a list of generators whose length does not match the batch size."
X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize("change, message", [
    (dict(shift=0.0), "shift must be a number > 0, got 0.0"),
    (dict(stochast_ratio="sde"), "stochasticity must be in [0, 1], got 'sde'"),
    (dict(rfba_gap_end=1.2), "gap_end must be in [0, 0.999], got 1.2"),
    (dict(gap_start=0.6, gap_end=0.5), "gap_end must be in [0, 0.4], got 0.5"),
    (dict(time_dist_ctrl=1.0), "time_dist_ctrl must be three numbers > 0"),
    (dict(seed=-1), "seed must be an integer in [0, 2^63), got -1"),
    (dict(seed=None), "seed must be an integer in [0, 2^63), got None"),
    (dict(num_train_timesteps=0), "num_train_timesteps must be an integer >= 1, got 0"),
    (dict(prediction_type="epsilon"), "prediction_type must be one of flow_matching, flow_prediction, got 'epsilon'"),
    (dict(time_condition="sign"), "time_condition must be one of t, midpoint, got 'sign'"),
    (dict(use_pipeline_sigmas=1), "use_pipeline_sigmas must be True or False, got 1"),
    (dict(gap_end=0.0, rfba_gap_end=0.3), "rfba_gap_end must be None or the value of gap_end, 0.0, got 0.3"),
    (dict(gap_start=0.1, rfba_gap_start=0.0), "rfba_gap_start must be None or the value of gap_start, 0.1, got 0.0"),
    (dict(stochasticity="SDE", stochast_ratio=1.0), "stochast_ratio must be None or the value of stochasticity, 'SDE'"),
])  # fmt: skip
def test_settings(change, message):
    with pytest.raises(ValueError) as error:
        TwinFlowScheduler(**change)
    assert str(error.value).startswith(f"TwinFlowScheduler: {message}")


@pytest.mark.parametrize("arguments, message", [
    (dict(), "num_inference_steps must be an integer >= 1, got None"),
    (dict(num_inference_steps=0), "num_inference_steps must be an integer >= 1, got 0"),
    (dict(num_inference_steps=2.0), "num_inference_steps must be an integer >= 1, got 2.0"),
    (dict(sigmas=[0.9, 0.5], timesteps=[900, 500]), "timesteps must be None where sigmas are given, got both"),
    (dict(num_inference_steps=3, sigmas=[0.9, 0.5]), "num_inference_steps must be 2 as the times given, got 3"),
    (dict(sigmas=[]), "sigmas must fall from 1 at most to above 0"),
    (dict(sigmas=[0.5, 0.9]), "sigmas must fall from 1 at most to above 0"),
    (dict(sigmas=[0.5, 0.5]), "sigmas must fall from 1 at most to above 0"),
    (dict(sigmas=[0.5, 0.0]), "sigmas must fall from 1 at most to above 0"),
    (dict(sigmas=[float("nan")]), "sigmas must fall from 1 at most to above 0"),
    (dict(timesteps=[1200, 500]), "timesteps must fall from 1 at most to above 0"),
])  # fmt: skip
def test_grids(arguments, message):
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(2)
    before = scheduler.timesteps
    with pytest.raises(ValueError) as error:
        scheduler.set_timesteps(**arguments)
    assert str(error.value).startswith(f"TwinFlowScheduler.set_timesteps: {message}")
    assert scheduler.timesteps is before and scheduler.num_inference_steps == 2


def test_before_set_timesteps():
    scheduler = TwinFlowScheduler()
    for call in (lambda: scheduler.step(X, scheduler.timesteps[0], X), scheduler.times):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == NOT_SET


@pytest.mark.parametrize("timestep, message", [
    (torch.tensor(999), "timestep must be a floating number of `timesteps`, got torch.int64"),
    (torch.tensor(0, dtype=torch.int32), "timestep must be a floating number of `timesteps`, got torch.int32"),
    (999, "timestep must be a number of `timesteps` or an index in [0, 2), got int 999"),
    (-1, "timestep must be a number of `timesteps` or an index in [0, 2), got int -1"),
    (2, "timestep must be a number of `timesteps` or an index in [0, 2), got int 2"),
    (np.int64(2), "timestep must be a number of `timesteps` or an index in [0, 2), got int64 2"),
    (True, "timestep must be a number of `timesteps` or an index in [0, 2), got bool True"),
    (500.0, "timestep must be one of 999, 600, got 500.0"),
    (torch.tensor([999.0, 600.0]), "timestep must be one floating number of `timesteps`"),
])  # fmt: skip
def test_timesteps_that_are_none(timestep, message):
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError) as error:
        scheduler.step(X, timestep, X)
    assert str(error.value).startswith(f"TwinFlowScheduler.step: {message}")
    assert scheduler.step_index is None


def test_integer_timesteps_stay_errors_after_the_first_step():
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    for timestep in (torch.tensor(999), np.int64(999), 7):
        with pytest.raises(ValueError, match=r"TwinFlowScheduler\.step: timestep must be"):
            scheduler.step(X, timestep, X)
    with pytest.raises(ValueError, match="timestep must be the index to come, 1, got 0"):
        scheduler.step(X, 0, X)
    scheduler.step(X, 1, X)
    with pytest.raises(ValueError, match="timestep must be the index to come, 2, got 1"):
        scheduler.step(X, 1, X)
    assert scheduler.step_index == 2


def test_after_the_last_step():
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(1)
    scheduler.step(X, scheduler.timesteps[0], X)
    for call in (lambda: scheduler.step(X, scheduler.timesteps[0], X), scheduler.times):
        with pytest.raises(ValueError, match="timesteps must have an evaluation left, got a call after all 1"):
            call()


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_a_list_of_generators_of_the_wrong_length(count, stochasticity):
    """Also where no noise is drawn."""
    scheduler = TwinFlowScheduler(stochasticity=stochasticity)
    scheduler.set_timesteps(2)
    generators = [torch.Generator() for _ in range(count)]
    with pytest.raises(ValueError) as error:
        scheduler.step(X, scheduler.timesteps[0], X, generator=generators)
    assert str(error.value) == WRONG_LIST and scheduler.step_index is None
    scheduler.set_generator(generators)
    with pytest.raises(ValueError) as error:
        scheduler.step(X, scheduler.timesteps[0], X)
    assert str(error.value) == WRONG_LIST


def test_what_is_no_generator():
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(2)
    for generator in (0, [0, 1]):
        with pytest.raises(TypeError, match=r"TwinFlowScheduler\.step: generator must be a torch\.Generator or a list"):
            scheduler.step(X, scheduler.timesteps[0], X, generator=generator)
        with pytest.raises(TypeError, match=r"TwinFlowScheduler\.set_generator: generator must be"):
            scheduler.set_generator(generator)


@pytest.mark.parametrize("index", [-1, 2, 1.0, True, None])
def test_begin_index(index):
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="begin_index must be an index into the 2 timesteps, got"):
        scheduler.set_begin_index(index)
    assert scheduler.begin_index is None


def test_shapes_and_shift():
    scheduler = TwinFlowScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"model_output must be of shape \(2, 3, 4, 4\), got \(2, 3, 4, 1\)"):
        scheduler.step(X[..., :1], scheduler.timesteps[0], X)
    with pytest.raises(ValueError, match=r"scale_noise: noise must be of shape \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"):
        scheduler.scale_noise(X, scheduler.timesteps[:1], X[:1])
    with pytest.raises(ValueError, match="scale_noise: timestep must hold 1 or 2 numbers, got 3"):
        scheduler.scale_noise(X, torch.full((3,), 600.0), X)
    with pytest.raises(ValueError, match=r"scale_noise: timestep must be one floating number of `timesteps`"):
        scheduler.scale_noise(X, torch.tensor([600]), X)
    with pytest.raises(ValueError, match=r"index_for_timestep: timestep must be one of 999, 600, got 601\.0"):
        scheduler.index_for_timestep(601.0)
    with pytest.raises(ValueError, match="set_shift: shift must be a number > 0, got -1"):
        scheduler.set_shift(-1)
    assert scheduler.shift == 1.0
