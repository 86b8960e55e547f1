"""Plain students of the real transformer classes: what stock transformers and stock pipelines compute."""

import functools

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.family_batches import (
    FAMILIES,
    MASKED,
    make_batch,
    make_condition,
    make_student,
    relative,
    stock_velocity,
)
from helpers.tiny_pipelines import call_arguments, latent_shape, saved_pipeline, tiny_transformer

from twinflow import StudentTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.models import load

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = torch.tensor([5, 9, 1, 5])
TIMES = torch.tensor([0.9, 0.31, 0.5, 0.02])


# What it computes.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_plain_student_is_the_stock_transformer_bit_for_bit(family, dtype):
    """Packing, positions, time scale, direction and sign; whatever r is."""
    student = make_student(family, dtype=dtype)
    x, cond, _ = make_batch(family, student, 4, dtype)
    found = student(x, TIMES, TIMES / 2, cond)
    expected = stock_velocity(family, tiny_transformer(family).to(dtype), x, TIMES, cond)
    assert torch.equal(found, expected)
    assert found.dtype == dtype and found.shape == x.shape and found.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_student_adds_nothing(family):
    stock = tiny_transformer(family)
    names = list(stock.state_dict())
    student = load(stock)
    student(*make_batch(family, student, 1)[:1], TIMES[:1], TIMES[:1], make_condition(student, 1))
    assert student.transformer is stock and list(stock.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
    assert type(stock).forward is type(tiny_transformer(family)).forward and "forward" not in vars(stock)


@functools.cache
def stock_run(family, dtype):
    """A stock pipeline, and (model output, timestep, sample) of each of its scheduler's steps."""
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline(family), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    steps, step = [], pipe.scheduler.step

    def recorded(model_output, timestep, sample, **more):
        steps.append((model_output.clone(), timestep.clone(), sample.clone()))
        return step(model_output, timestep, sample, **more)

    pipe.scheduler.step = recorded
    pipe(prompt=PROMPT, num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0),
         **call_arguments(family))  # fmt: skip
    return pipe, steps


PROMPT = "two dogs on a hill"
EXACT = ("qwen_image", "sd3", "flux", "flux_guidance")  # Z-Image's time and SANA's padding are rounded otherwise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_plain_student_answers_as_the_stock_pipelines_denoiser(family, dtype):
    """From the prompt's text to what the pipeline hands its scheduler, at every step of a drawing."""
    pipe, steps = stock_run(family, dtype)
    student = load(pipe.transformer)
    cond = student.encode_prompt(pipe, [PROMPT], **({"complex_human_instruction": None} if family == "sana" else {}))
    if family == "flux_guidance":
        cond["guidance"] = torch.zeros(1)
    assert len(steps) == 3
    for output, timestep, sample in steps:
        if sample.dim() == 3:  # packed
            sample, output = (unpacked(family, tokens) for tokens in (sample, output))
        t = timestep.double()[None] / 1000
        if family in ("qwen_image", "flux", "flux_guidance"):  # rounded to the latents' dtype, then divided in it
            t = (timestep.to(sample.dtype) / 1000)[None].float()
        found = student(sample, t, t, cond)
        if family in EXACT:
            assert torch.equal(found, output)
        else:
            assert relative(found.float(), output.float()) < (1e-5 if dtype == torch.float32 else 1e-2)


def unpacked(family, tokens):
    pipe, _ = stock_run(family, torch.float32)
    _, _, height, width = latent_shape(family, 1)
    image = pipe._unpack_latents(tokens, height * pipe.vae_scale_factor, width * pipe.vae_scale_factor,
                                 pipe.vae_scale_factor)  # fmt: skip
    return image.squeeze(2) if image.dim() == 5 else image


@torch.no_grad()
def test_guidance_that_flux_embeds():
    """The pipeline's default unless the condition brings its own, row by row."""
    student = make_student("flux_guidance")
    x, cond, _ = make_batch("flux_guidance", student, 3)
    t = TIMES[:3]
    default = student(x, t, t, cond)
    assert torch.equal(default, student(x, t, t, cond | {"guidance": torch.full((3,), 3.5)}))
    rows = student(x, t, t, cond | {"guidance": torch.tensor([3.5, 1.0, 7.0])})
    changed = (rows - default).flatten(1).norm(dim=1) / default.flatten(1).norm(dim=1)
    assert changed[0] < 1e-5 and changed[1:].min() > 1e-3
    student.guidance = 1.0
    assert relative(student(x, t, t, cond)[1], rows[1]) < 1e-5


@pytest.mark.parametrize("family", MASKED)
def test_encoded_prompts_keep_their_lengths_and_the_callers_list(family):
    """A batch of prompts is encoded as each alone."""
    pipe, _ = stock_run(family, torch.float32)
    student = load(pipe.transformer)
    options = {"complex_human_instruction": None} if family == "sana" else {}
    prompts = ["a red fox", "two dogs on a hill under a tree"]
    with torch.no_grad():
        cond = student.encode_prompt(pipe, prompts, **options)
        singles = [student.encode_prompt(pipe, [prompt], **options) for prompt in prompts]
    assert prompts == ["a red fox", "two dogs on a hill under a tree"]
    lengths = cond["prompt_lengths"]
    assert lengths.device.type == "cpu" and lengths[0] < lengths[1]
    for k, single in enumerate(singles):
        assert single["prompt_lengths"].tolist() == [lengths[k]]
        torch.testing.assert_close(cond["prompt_embeds"][k, : lengths[k]], single["prompt_embeds"][0, : lengths[k]])


# Bad input.


def bad_inputs(family, student, x, cond):
    """(latents, condition, message)."""
    batch, channels, height, width = x.shape
    for shape in ((batch, channels + 1, height, width), x.shape[1:]):
        yield torch.randn(shape), cond, f"x_t must be latents (B, {channels}, H, W), got shape {tuple(shape)}"
    if family != "sana":  # whose patches are 1x1
        for size in ((height + 1, width), (height, width - 1)):
            latents = torch.randn(batch, channels, *size)
            yield latents, cond, f"x_t must be of height and width divisible by 2, got {size}"
    for name, size in student.condition_widths().items():
        kind = f"cond[{name!r}] must be"
        tokens, shown = ((7,), f"(B, L, {size})") if name == "prompt_embeds" else ((), f"(B, {size})")
        others = [other for other in cond if other != name]
        wrong = (batch, *tokens, size + 8)
        wanted = f"{kind} {shown}, got {wrong}; is it another family's embedding?"
        yield x, cond | {name: torch.randn(wrong)}, wanted
        yield x, {n: cond[n] for n in others}, f"cond must have {name!r}, got {', '.join(others) or 'nothing'}"
        yield x, cond | {name: torch.randn(3, *tokens, size)}, f"{kind} of 2 rows, as x_t, got 3"
    for none in (None, cond["prompt_embeds"], [cond["prompt_embeds"]]):
        wanted = f"cond must be a dict with {', '.join(student.condition_widths())}, got {type(none).__name__}"
        yield x, none, wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_input_is_named(family):
    student = make_student(family)
    x, cond, _ = make_batch(family, student, 2)
    for latents, condition, message in bad_inputs(family, student, x, cond):
        with pytest.raises((ArgumentError, ArgumentTypeError)) as error:
            student(latents, TIMES[:2], TIMES[:2], condition)
        assert str(error.value) == f"{type(student).__name__}: {message}"
        assert isinstance(error.value, TypeError) == (not isinstance(condition, dict))


# Without conditioning.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_student_refuses_times_it_would_not_hear_of(family):
    """Before the first call of the network; a step of plain flow matching it takes."""
    student = make_student(family)
    batch, calls = make_batch(family, student, 4), []
    student.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    message = rf"TwinFlowLoss: student must be told target time and sign, got a {student.family} model without cond"
    with pytest.raises(ValueError, match=message):
        TwinFlowLoss()(student, *batch, teacher=StudentTeacher(student))
    assert not calls
    plain = TwinFlowConfig(estimate_order=0, adversarial=False, enhanced_ratio=0.0, shares={"mul": 1})
    criterion = TwinFlowLoss(plain)
    draws = criterion.draw(batch[0])
    draws.r.copy_(draws.t)
    out = criterion(student, *batch, draws=draws)
    assert torch.isfinite(out.loss) and calls
