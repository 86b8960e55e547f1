"""The images that a run draws are those that stock pipelines draw with its export."""

import numpy as np
import pytest
import torch
from drawing import arguments, encoding
from export_cases import stock_pipeline
from validation_cases import PROMPTS, drawn, sampler_of, settings_for, student_of

import twinflow
from twinflow import EMATeacher, StudentTeacher
from twinflow.export import export
from twinflow.scheduler import TwinFlowScheduler

FAMILIES = ("sd3", "qwen_image", "flux", "z_image", "sana")


def stock_image(pipe, settings, family: str, prompt: str, steps: int, seed: int) -> np.ndarray:
    """One image of a pipeline with an export attached, guidance off, as uint8."""
    width, height = settings.validation_resolution
    call = {name: value for name, value in arguments(family).items() if name not in encoding(family)}
    pipe.scheduler = TwinFlowScheduler.from_config(pipe.scheduler.config, seed=seed)
    image = pipe(
        prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="np",
        **call | {"height": height, "width": width},
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
    sampler = sampler_of(settings)
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
