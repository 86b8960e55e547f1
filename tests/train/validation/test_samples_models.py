"""Samples of models in every state that a run may have them in."""

import numpy as np
import pytest
import torch
from helpers.validation_cases import PROMPTS, drawn, encoded, sampler_of, settings_for, student_of

from twinflow import EMATeacher
from twinflow.memory.modulation.defer import defer_modulation


def images_of(settings, student, teacher=None, step: int = 1, **more) -> np.ndarray:
    sampler_of(settings, encoded("sd3"), **more).draw(step, student, teacher)
    return np.stack([*drawn(settings, step)[1].values()]).astype(int)


@pytest.mark.parametrize("average", [False, True])
def test_deferred_modulation_draws_the_same(average, tmp_path):
    settings = settings_for(tmp_path)
    found = []
    for deferred in (False, True):
        student = student_of(settings)
        handle = defer_modulation(student) if deferred else None
        teacher = EMATeacher(student, 0.9) if average else None
        found.append(images_of(settings, student, teacher))
        assert handle is None or handle.active
    assert np.abs(found[0] - found[1]).max() <= 1


def test_a_bfloat16_base_draws_nearly_the_same(tmp_path):
    found = []
    for precision in ("no", "bf16"):
        settings = settings_for(tmp_path, mixed_precision=precision)
        student = student_of(settings)
        assert student.dtype == (torch.float32 if precision == "no" else torch.bfloat16)
        found.append(images_of(settings, student))
    assert 0 < np.abs(found[0] - found[1]).mean() < 6


def test_autocast_is_the_calls(tmp_path):
    settings = settings_for(tmp_path, model_type="full")
    student = student_of(settings)
    whole = images_of(settings, student)
    heard = []
    hook = student.network.proj_out.register_forward_hook(lambda module, args, out: heard.append(out.dtype))
    cast = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    half = images_of(settings, student, EMATeacher(student, 0.9), **cast)
    again = images_of(settings, student, **cast)
    hook.remove()
    assert set(heard) == {torch.bfloat16} and not torch.is_autocast_enabled("cpu")
    assert np.array_equal(half, again) and not np.array_equal(half, whole)


@pytest.mark.parametrize(("family", "guidance", "calls"), [("sd15", 4.0, 120), ("flux", 0.0, 60)])
def test_base_models_are_guided_unless_guidance_is_in_their_weights(family, guidance, calls, tmp_path):
    settings = settings_for(tmp_path, family)
    student = student_of(settings, changed=False)
    sampler = sampler_of(settings, encoded(family))
    heard = []
    with student.register_forward_pre_hook(lambda module, args: heard.append(args)):
        sampler.base(student)
    told, images = drawn(settings, None)
    assert len(heard) == calls and {i["guidance"] for i in told["images"]} == {guidance}
    sampler.draw(1, student)
    few = drawn(settings, 1)[1]
    assert few[PROMPTS[0], 1].shape == images[PROMPTS[0], 30].shape == (32, 48, 3)
    assert not np.array_equal(few[PROMPTS[0], 1], few[PROMPTS[1], 1])


def test_the_trained_number_of_steps_is_drawn_beside_1_2_and_4(tmp_path):
    for target, expected in ((1, [1, 2, 4]), (3, [1, 2, 3, 4]), (8, [1, 2, 4, 8])):
        sampler = sampler_of(settings_for(tmp_path, twinflow_target_step_count=target), encoded("sd3"))
        assert [method.steps for method in sampler.methods] == expected
        assert all(method.guidance == 0.0 and method.style == "few" for method in sampler.methods)
    assert [method.heading for method in sampler.methods][:2] == ["1 step", "2 steps"]
