"""The images that a run draws are those that stock pipelines draw with its export."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from helpers.drawing import arguments, encoding
from helpers.export_cases import stock_pipeline
from helpers.tiny_pipelines import saved_pipeline
from helpers.validation_cases import CPU, PROMPTS, bytes_of, drawn, encoded, sampler_of, settings_for, student_of

import twinflow
from twinflow import EMATeacher, StudentTeacher
from twinflow.export import export
from twinflow.sampling.sampler import SamplerConfig
from twinflow.scheduler import TwinFlowScheduler
from twinflow.train.checkpoint.run_state import collect_streams
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.validation.eval_mode import eval_mode
from twinflow.train.validation.samples import pipeline_shift

# In whose pipelines the steps' noise is in images, in tokens, and from the generator of the first noise.
FAMILIES = ("sd3", "qwen_image", "sana")


def stock_image(pipe, settings, family: str, prompt: str, steps: int, seed: int, **more) -> np.ndarray:
    """One image of a pipeline with a TwinFlowScheduler, as uint8."""
    width, height = settings.validation_resolution
    call = {name: value for name, value in arguments(family).items() if name not in encoding(family)}
    pipe.scheduler = TwinFlowScheduler.from_config(pipe.scheduler.config, seed=seed)
    image = pipe(
        prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="np",
        **call | {"height": height, "width": width} | more,
    ).images[0]  # fmt: skip
    return (image * 255).round().astype(np.uint8)


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape and found.std() > 5
    difference = np.abs(found.astype(int) - wanted)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_those_of_the_export_in_a_stock_pipeline(family, tmp_path):
    """With the same seeds, for every number of steps, by student and average."""
    settings = settings_for(tmp_path, family)
    student = student_of(settings)
    teacher = EMATeacher(student, 0.9)
    teacher.update()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5 if parameter.requires_grad else 1)
    teacher.update()
    sampler = sampler_of(settings, encoded(family))
    said = sampler.draw(7, student, StudentTeacher(student)), sampler.draw(8, student, teacher)
    assert "student weights, step 7" in said[0] and "EMA weights, step 8" in said[1]
    for step, average in ((7, None), (8, teacher)):
        told, images = drawn(settings, step)
        assert told["weights"] == ("ema" if average else "student") and told["step"] == step
        pipe = twinflow.attach(stock_pipeline(family), export(student, tmp_path / str(step), teacher=average))
        for number, prompt in enumerate(PROMPTS):
            for steps in (1, 2, 4) if average is None and number else (2,):
                assert_same(images[prompt, steps], stock_image(pipe, settings, family, prompt, steps, 5 + number))
    assert not np.array_equal(images[PROMPTS[0], 2], drawn(settings, 7)[1][PROMPTS[0], 2])


@pytest.mark.parametrize(
    ("family", "changes", "scale"),
    [
        ("sd3", {}, {"guidance_scale": 4.0}),
        ("flux", {"twinflow_enabled": False, "validation_guidance": 3.0}, {"true_cfg_scale": 3.0}),
    ],
)
def test_the_base_model_is_the_stock_pipelines_with_guidance(family, changes, scale, tmp_path):
    """30 Euler steps over the pipeline's own shift, away from the negative prompt."""
    settings = settings_for(tmp_path, family, **changes)
    assert "base model" in sampler_of(settings, encoded(family)).base(student_of(settings, changed=False))
    told, images = drawn(settings, None)
    assert told["weights"] == "base" and {i["guidance"] for i in told["images"]} == {*scale.values()}
    pipe = stock_pipeline(family)
    pipe.scheduler = TwinFlowScheduler(shift=pipe.scheduler.config.shift, style="mul", stochasticity=0.0)
    for number, prompt in enumerate(PROMPTS):
        wanted = stock_image(pipe, settings, family, prompt, 30, 5 + number, **scale, negative_prompt="")
        assert_same(images[prompt, 30], wanted)


def test_plain_flow_matching_samples_as_the_settings_say(tmp_path):
    """Euler steps, guided by `validation_guidance` away from the negative prompt; 1 is no guidance."""
    changes = dict(twinflow_enabled=False, validation_num_inference_steps=3)
    found = {}
    for scale in (1, 3):
        settings = settings_for(tmp_path / str(scale), **changes, validation_guidance=scale)
        student = student_of(settings)
        calls = []
        student.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args))
        sampler_of(settings, encoded("sd3")).draw(1, student)
        told, found[scale] = drawn(settings, 1)
        about = told["images"][0]
        assert (about["steps"], about["style"], about["guidance"]) == (3, "mul", scale)
        assert len(calls) == (6 if scale == 1 else 12)
        assert all(torch.equal(t, r) for _, t, r, _ in calls)
    assert not np.array_equal(found[1][PROMPTS[0], 3], found[3][PROMPTS[0], 3])


@pytest.mark.parametrize("family", ["sd3", "qwen_image", "sana", "flux", "flux_guidance", "z_image", "sd15"])
def test_times_are_shifted_as_the_pipelines_scheduler_shifts_them(family):
    folder, size = saved_pipeline(family), (64, 96)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    times = np.linspace(1, 1 / 8, 8)
    scheduler, config = pipe.scheduler, pipe.scheduler.config
    if config.get("use_dynamic_shifting"):
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        lengths = config.base_image_seq_len, config.max_image_seq_len
        mu = calculate_shift(64 * 96 // 4, *lengths, config.base_shift, config.max_shift)
        expected = scheduler.time_shift(mu, 1.0, times)
    elif family in ("sana", "sd15"):
        expected = 3 * times / (1 + 2 * times) if family == "sana" else times
    else:
        scheduler.set_timesteps(sigmas=times.tolist())
        expected = scheduler.sigmas[:-1].numpy()
    assert SamplerConfig(shift=pipeline_shift(folder, size)).shifted(times.tolist()) == pytest.approx(expected.tolist())


def test_a_prompt_has_the_same_noise_every_time(tmp_path):
    """At another step, beside other prompts; a resumed run redraws the same files."""
    settings = settings_for(tmp_path)
    student, prompts, run = student_of(settings), encoded("sd3"), RunFolder(settings.output_dir)
    sampler_of(settings, prompts).draw(3, student)
    first = bytes_of(run.samples_at(3))
    assert sorted(first) == ["01-1.png", "01-2.png", "01-4.png", "02-1.png", "02-2.png", "02-4.png", "grid.png",
                             "samples.json"]  # fmt: skip
    torch.randn(5)
    other = replace(prompts, texts=("other", PROMPTS[1]), conditions=prompts.conditions[1:] * 2)
    sampler_of(settings, other).draw(4, student)
    beside = bytes_of(run.samples_at(4))
    assert all(beside[name] == first[name] for name in first if name.startswith("02"))
    assert beside["01-1.png"] not in (first["01-1.png"], first["02-1.png"])
    sampler_of(settings, prompts).draw(3, student)
    assert bytes_of(run.samples_at(3)) == first


def test_a_run_goes_on_as_if_nothing_had_been_drawn(tmp_path):
    """Neither random streams nor modes nor gradients show it; dropout is off meanwhile."""
    settings = settings_for(tmp_path)
    student = student_of(settings)
    sampler_of(settings, encoded("sd3")).draw(1, student)
    student.train()
    student.network.transformer_blocks[0].ff.net[1].p = 0.5
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    before = collect_streams({})
    sampler_of(settings, encoded("sd3")).draw(2, student)
    sampler_of(settings, encoded("sd3")).base(student)
    after = collect_streams({})
    assert torch.equal(after["torch"], before["torch"]) and after["python"] == before["python"]
    assert str(after["numpy"]) == str(before["numpy"])
    assert all(module.training for module in student.modules())
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    images = (drawn(settings, step)[1][PROMPTS[0], 4] for step in (1, 2))
    assert np.array_equal(*images)
    with pytest.raises(RuntimeError), eval_mode(student, CPU):
        torch.randn(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before["torch"]) and student.training
