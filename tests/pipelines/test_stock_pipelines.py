"""TwinFlowScheduler inside the unmodified pipelines of diffusers, on tiny weights loaded from disk."""

import functools
import inspect
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from helpers.tiny_pipelines import call_arguments, image_size, latent_shape, saved_pipeline

from twinflow.sampling.grid import sampling_grid
from twinflow.scheduler import TwinFlowScheduler

FAMILIES = ("qwen_image", "sd3", "sana", "flux", "z_image")
IMG2IMG = {
    "qwen_image": QwenImageImg2ImgPipeline, "sd3": StableDiffusion3Img2ImgPipeline, "flux": FluxImg2ImgPipeline,
    "z_image": ZImageImg2ImgPipeline,
}  # fmt: skip
INPAINT = {
    "qwen_image": QwenImageInpaintPipeline, "sd3": StableDiffusion3InpaintPipeline, "flux": FluxInpaintPipeline,
    "z_image": ZImageInpaintPipeline,
}  # fmt: skip
PROMPTS = ["a red fox", "two dogs on a green hill"]
# The published times of one, two and four steps.
GRIDS = {1: [0.999], 2: [0.999, 0.6], 4: [0.999, 0.832666667, 0.666333333, 0.5]}


def later(skipped: int) -> list[float]:
    """The times of 4 steps of which some are skipped: from where a stock scheduler starts."""
    grid = sampling_grid(4 - skipped)[:-1]
    return [(1 - skipped / 4) * time / grid[0] for time in grid] if skipped else GRIDS[4]


class Record:
    """What a pipeline's transformer was asked and what it answered, in order, as times and noise-ward velocities."""

    def __init__(self, pipe: DiffusionPipeline, family: str) -> None:
        self.family, self.times, self.inputs, self.velocities = family, [], [], []
        self.signature = inspect.signature(pipe.transformer.forward)
        pipe.transformer.register_forward_hook(self.keep, with_kwargs=True)

    def keep(self, _module: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        asked = self.signature.bind(*args, **kwargs).arguments
        if self.family == "z_image":  # (C, 1, H, W) for each row, time and velocity run from noise to data
            self.times.append(1 - asked["t"].double())
            self.inputs.append(torch.stack(asked["x"]).squeeze(2))
            self.velocities.append(-torch.stack(output[0]).squeeze(2))
            return
        per_unit = 1000 if self.family in ("sd3", "sana") else 1
        self.times.append(asked["timestep"].double() / per_unit)
        self.inputs.append(asked["hidden_states"])
        self.velocities.append(output[0])


def load(family: str, **scheduler: object) -> tuple[DiffusionPipeline, Record]:
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline(family))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = TwinFlowScheduler(num_train_timesteps=1000, shift=1.0, **scheduler)
    return pipe, Record(pipe, family)


def noise(pipe: DiffusionPipeline, family: str) -> torch.Tensor:
    """Seeded noise for both prompts, packed where the pipeline wants it so."""
    shape = latent_shape(family, len(PROMPTS))
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return pipe._pack_latents(z, *shape) if family in ("qwen_image", "flux") else z


def draw(pipe: DiffusionPipeline, family: str, steps: int, **more: object) -> torch.Tensor:
    more = {"latents": noise(pipe, family), "output_type": "latent"} | more
    return pipe(prompt=list(PROMPTS), num_inference_steps=steps, **call_arguments(family), **more).images


def seen(times: list[torch.Tensor]) -> list[list[float]]:
    return [row.tolist() for row in times]


@pytest.mark.parametrize("family", ["sd3", "qwen_image"])
def test_the_published_snippet_runs_with_only_the_import_changed(family):
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline(family))
    record = Record(pipe, family)
    pipe.scheduler = TwinFlowScheduler(num_train_timesteps=1000, prediction_type="flow_matching", shift=1.0)
    pipe.scheduler.set_timesteps(num_inference_steps=2, device=pipe.device)
    images = pipe(prompt="a red fox", guidance_scale=0.0, num_inference_steps=2).images
    assert len(images) == 1 and len(images[0].getcolors(maxcolors=1 << 16)) > 10
    assert seen(record.times) == [pytest.approx([0.999], abs=1e-6), pytest.approx([0.6], abs=1e-6)]


@pytest.mark.parametrize("steps", GRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_transformer_sees_the_published_times(family, steps):
    pipe, record = load(family)
    images = draw(pipe, family, steps, output_type="pt")
    assert images.shape == (2, 3, *image_size(family)) and images.isfinite().all()
    assert seen(record.times) == [pytest.approx([time] * 2, abs=1e-6) for time in GRIDS[steps]]


@pytest.mark.parametrize("family", ["qwen_image", "flux", "z_image"])
def test_the_times_a_pipeline_sends_count_when_asked_for(family):
    pipe, record = load(family, use_pipeline_sigmas=True)
    draw(pipe, family, 4)
    assert seen(record.times) == [pytest.approx([time] * 2, abs=1e-6) for time in (1.0, 0.75, 0.5, 0.25)]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_is_the_noise_less_its_velocity(family):
    pipe, record = load(family)
    latents = draw(pipe, family, 1)
    torch.testing.assert_close(record.inputs[0], noise(pipe, family))
    torch.testing.assert_close(latents, record.inputs[0] - 0.999 * record.velocities[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_renoise_the_predicted_data(family):
    pipe, record = load(family)
    latents = draw(pipe, family, 2)
    predicted = record.inputs[0] - 0.999 * record.velocities[0]
    fresh = (record.inputs[1] - 0.4 * predicted) / 0.6
    assert fresh.mean().abs() < 0.1 and 0.9 < fresh.std() < 1.1
    for known in (record.inputs[0], record.velocities[0]):
        assert torch.nn.functional.cosine_similarity(fresh.flatten(), known.flatten(), dim=0).abs() < 0.1
    torch.testing.assert_close(latents, record.inputs[1] - 0.6 * record.velocities[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_second_order_asks_twice_in_every_step_but_the_last(family):
    pipe, record = load(family, order=2, stochasticity=0.0)
    latents = draw(pipe, family, 2)
    assert seen(record.times) == [pytest.approx([time] * 2, abs=1e-6) for time in (0.999, 0.6, 0.6)]
    mean = (record.velocities[0] + record.velocities[1]) / 2
    torch.testing.assert_close(record.inputs[1], record.inputs[0] - 0.399 * record.velocities[0])
    torch.testing.assert_close(record.inputs[2], record.inputs[0] - 0.399 * mean)
    torch.testing.assert_close(latents, record.inputs[2] - 0.6 * record.velocities[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_pipeline_walks_the_same_grid(family):
    pipe, record = load(family)
    pipe.to(torch.bfloat16)
    latents = draw(pipe, family, 4, latents=noise(pipe, family).to(torch.bfloat16), output_type="latent")
    assert latents.isfinite().all()
    # bfloat16 keeps 8 bits: pipelines that cast the time move it by up to 2^-9 of itself.
    assert seen(record.times) == [pytest.approx([time] * 2, rel=2**-8) for time in GRIDS[4]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_noise_gives_the_same_image(family):
    pipe, _ = load(family, seed=3)
    first = draw(pipe, family, 2)
    torch.randn(7)  # the global stream moves on and must not matter
    assert torch.equal(draw(pipe, family, 2), first)
    other, _ = load(family, seed=4)
    assert not torch.allclose(draw(other, family, 2), first, atol=1e-2)


def test_sana_passes_its_generators_to_the_steps():
    pipe, record = load("sana")

    def run(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return draw(pipe, "sana", 2, generator=generators, latents=noise(pipe, "sana"))

    first, again, other = run(1, 2), run(1, 2), run(1, 5)
    assert torch.equal(first, again)
    assert torch.equal(other[0], first[0])
    assert not torch.allclose(other[1], first[1], atol=1e-2)
    assert len(record.times) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_pipeline_brings_the_scheduler_back(family, tmp_path: Path):
    pipe, _ = load(family, seed=11, gap_end=0.25, stochasticity=0.5)
    expected = draw(pipe, family, 2)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is TwinFlowScheduler
    assert public(loaded.scheduler) == public(pipe.scheduler)
    record = Record(loaded, family)
    assert torch.equal(draw(loaded, family, 2), expected)
    assert seen(record.times)[1] == pytest.approx([0.25] * 2, abs=1e-6)


def public(scheduler: TwinFlowScheduler) -> dict:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


@functools.cache
def picture(family: str) -> torch.Tensor:
    height, width = image_size(family)
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def load_with_image(cls: type[DiffusionPipeline], family: str) -> tuple[DiffusionPipeline, Record, list]:
    """The pipeline, its record, and (data, noise, result) of every call of the scheduler's `scale_noise`."""
    pipe = cls.from_pipe(load(family)[0])
    pipe.set_progress_bar_config(disable=True)
    scale_noise, calls = pipe.scheduler.scale_noise, []

    def recorded(sample: torch.Tensor, timestep: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        calls.append((sample, fresh, scale_noise(sample, timestep, fresh)))
        return calls[-1][-1]

    pipe.scheduler.scale_noise = recorded
    return pipe, Record(pipe, family), calls


def assert_same_numbers(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equality of latents whatever their packing."""
    torch.testing.assert_close(actual.flatten().sort().values, expected.flatten().sort().values)


@pytest.mark.parametrize(("strength", "skipped"), [(1.0, 0), (0.75, 1), (0.5, 2), (0.25, 3)])
@pytest.mark.parametrize("family", IMG2IMG)
def test_image_to_image_starts_where_strength_says(family, strength, skipped):
    pipe, record, calls = load_with_image(IMG2IMG[family], family)
    arguments = call_arguments(family) | dict(image=picture(family), strength=strength, output_type="latent")
    latents = pipe(prompt="a red fox", num_inference_steps=4, **arguments).images
    grid = later(skipped)
    assert seen(record.times) == [pytest.approx([time], abs=1e-6) for time in grid]
    ((data, fresh, start),) = calls
    torch.testing.assert_close(start, (1 - grid[0]) * data + grid[0] * fresh)
    assert_same_numbers(record.inputs[0], start)
    torch.testing.assert_close(latents, record.inputs[-1] - grid[-1] * record.velocities[-1])


@pytest.mark.parametrize("family", INPAINT)
def test_inpainting_keeps_what_the_mask_leaves(family):
    pipe, record, calls = load_with_image(INPAINT[family], family)
    image = picture(family)
    arguments = call_arguments(family) | dict(image=image, mask_image=torch.zeros_like(image[:, :1]), strength=0.75)
    latents = pipe(prompt="a red fox", num_inference_steps=4, output_type="latent", **arguments).images
    assert seen(record.times) == [pytest.approx([time], abs=1e-6) for time in later(1)]
    data, fresh, _ = calls[0]
    for time, asked in zip(later(1), record.inputs, strict=True):
        assert_same_numbers(asked, (1 - time) * data + time * fresh)
    assert_same_numbers(latents, data)
