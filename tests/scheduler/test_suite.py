"""What diffusers asks of every scheduler: configurations, step shapes, outputs, attributes."""

import inspect

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from twinflow.scheduler import TwinFlowScheduler, TwinFlowSchedulerOutput

CONFIGS = [
    dict(),
    dict(num_train_timesteps=1000, shift=1.0),
    dict(num_train_timesteps=500, shift=3.0, style="mul", order=2),
    dict(style="any", time_condition="midpoint", time_dist_ctrl=(1.17, 0.8, 1.1), gap_end=0.0),
    dict(stochasticity="SDE", extrapolation=0.4, seed=7, use_pipeline_sigmas=True),
    dict(prediction_type="flow_matching", rfba_gap_start=0.01, rfba_gap_end=0.2, stochast_ratio=0.5),
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))


def dummy():
    sample = torch.rand(4, 3, 8, 8)
    return sample, 0.1 * sample


def reloaded(scheduler, directory):
    scheduler.save_config(directory)
    return TwinFlowScheduler.from_pretrained(directory)


@configs
@pytest.mark.parametrize("time_step", [0, 1])
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_a_reloaded_scheduler_steps_the_same(config, time_step, steps, tmp_path):
    """A Python int counts within the timesteps; 0 and 1 are what the common suite passes."""
    sample, residual = dummy()
    scheduler = TwinFlowScheduler(**config)
    outputs = []
    for each in (scheduler, reloaded(scheduler, tmp_path)):
        each.set_timesteps(steps)
        assert each.scale_model_input(sample, 0) is sample
        outputs.append(each.step(residual, time_step, sample, generator=torch.manual_seed(0)).prev_sample)
    assert torch.equal(*outputs) and outputs[0].isfinite().all()


@configs
def test_a_configuration_is_equal_after_reading_it_back(config, tmp_path):
    scheduler = TwinFlowScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    saved = dict(scheduler.config)
    del saved["_use_default_values"]
    assert saved == TwinFlowScheduler.from_pretrained(tmp_path).config
    assert {name: saved[name] for name in config} == config | {
        name: list(value) for name, value in config.items() if isinstance(value, tuple)
    }


@configs
def test_tuple_and_dict_outputs_agree(config):
    sample, residual = dummy()
    scheduler = TwinFlowScheduler(**config)
    outputs = []
    for return_dict in (True, False):
        scheduler.set_timesteps(50)
        generator = torch.manual_seed(0)
        outputs.append(scheduler.step(residual, 0, sample, generator=generator, return_dict=return_dict))
    assert type(outputs[0]) is TwinFlowSchedulerOutput and type(outputs[1]) is tuple and len(outputs[1]) == 2
    for named, placed in zip(outputs[0].values(), outputs[1], strict=True):
        assert torch.equal(named, placed)
    assert outputs[0].prev_sample is outputs[0][0]


@configs
def test_compatible_schedulers_keep_the_configuration(config):
    scheduler = TwinFlowScheduler(**config)
    assert set(scheduler.compatibles) == {FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler}
    for other in scheduler.compatibles:
        back = TwinFlowScheduler.from_config(other.from_config(scheduler.config).config)
        kept = {name: value for name, value in back.config.items() if name in scheduler.config}
        assert kept == dict(scheduler.config)
        added = set(back.config) - set(scheduler.config)
        assert not added & set(inspect.signature(TwinFlowScheduler.__init__).parameters)


def test_no_keyword_catches_all():
    assert "kwargs" not in inspect.signature(TwinFlowScheduler.__init__).parameters
    assert TwinFlowScheduler._deprecated_kwargs == []
