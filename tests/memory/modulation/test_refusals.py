"""Deferred modulation: what it refuses, when it is attached and later."""

import pytest
import torch
from helpers.deferred_cases import assert_equal, backward_once, student_of, trained
from helpers.family_batches import make_batch, make_student
from helpers.tiny_pipelines import tiny_transformer
from torch import distributed, nn

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.lora import add_lora
from twinflow.memory import quantise_base
from twinflow.memory.modulation.defer import defer_modulation
from twinflow.models import load


def with_lora_on(*targets):
    return add_lora(make_student("qwen_image"), rank=2, targets=targets)


def changed(change):
    student = student_of("sd3")
    change(student)
    return student


def as_quantised(student):
    student.network.norm_out.linear.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)


def packed():
    student = student_of("qwen_image")
    quantise_base(student, "int8")
    return student


def edit_model():
    return load(tiny_transformer("qwen_image", zero_cond_t=True).requires_grad_(False))


def sd3():
    return student_of("sd3")


@pytest.mark.parametrize("make, options, argument, parts", [
    (lambda: nn.Linear(2, 2), {}, "student", "from twinflow.models.load, got Linear"),
    (lambda: student_of("sana"), {}, "student", "modulation layers that read its time embedding, got sana without any"),
    (lambda: make_student("sd3"), {}, "modulation", "training of transformer_blocks.0.norm1.linear and 4 more; leave"),
    (lambda: with_lora_on("txt_mod.1", "to_q"), {}, "modulation", "training of transformer_blocks.0.txt_mod.1 and 1"),
    (lambda: with_lora_on("norm_out.linear").requires_grad_(False), {}, "modulation",
     "plain linear layers, got Linear with torch.float32 at norm_out.linear; load it in bf16, and merge an adapter"),
    (lambda: changed(as_quantised), {}, "modulation", "plain linear layers, got Linear with torch.uint8 at norm_out"),
    (lambda: changed(defer_modulation), {}, "student", "without it yet"),
    (packed, {}, "modulation", "whole weights, got int8 at transformer_blocks.0.img_mod.1 and 3 more; load again, and"),
    (edit_model, {}, "student", "one time embedding a row, got an edit model with two"),
    (sd3, {"device": "xpu"}, "device", "cuda or cpu where the student has data, got xpu"),
    (sd3, {"device": "meta"}, "device", "cuda or cpu where the student has data, got meta"),
])  # fmt: skip
def test_students_that_cannot_be_deferred(make, options, argument, parts):
    student = make()
    with pytest.raises((ArgumentError, ArgumentTypeError)) as error:
        defer_modulation(student, **options)
    assert error.value.argument == argument and parts in str(error.value)


def test_sharded_models_are_refused(one_rank):
    student = student_of("sd3")
    layer = student.network.proj_out
    mesh = distributed.init_device_mesh("cpu", (1,))
    layer.weight = nn.Parameter(distributed.tensor.distribute_tensor(layer.weight.data, mesh), requires_grad=False)
    with pytest.raises(ArgumentError, match="must be whole on its device, got a sharded model"):
        defer_modulation(student)


@pytest.mark.parametrize("move", [
    lambda s: s.to(torch.float64), lambda s: s.network.half(), lambda s: s.transformer.to("meta"),
    lambda s: s.network.norm_out.linear.double(),
])  # fmt: skip
def test_moving_and_casting_are_refused(move):
    student = student_of("sd3")
    plain = trained(student_of("sd3"), 1)
    with defer_modulation(student):
        with pytest.raises(RuntimeError, match=r"must stay on cpu and in its dtype .* got a change to .*; remove"):
            move(student)
        assert student.to("cpu") is student and student.network.float() is student.network  # as accelerate prepares
        assert_equal(trained(student, 1), plain)


def test_a_change_that_adapters_alone_would_feel_is_refused():
    student = student_of("sd3", dtype=torch.bfloat16)
    with defer_modulation(student), pytest.raises(RuntimeError, match=r"got a change to torch\.bfloat16 on cpu"):
        student.to(torch.bfloat16)


def test_a_later_lora_on_the_modulation_is_refused():
    student = student_of("qwen_image")
    with defer_modulation(student):
        add_lora(student, rank=2, targets=("img_mod.1",), adapter="more")
        with pytest.raises(ValueError, match=r"transformer_blocks\.0\.img_mod\.1 must stay frozen and without adapter"):
            backward_once(student)


def test_a_teacher_made_before_is_refused():
    """Its copy of the module would compute modulation from weights that are elsewhere by then."""
    student = make_student("qwen_image", "dual")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("attn" in name or "_2." in name)
    teacher = EMATeacher(student, 0.9)
    with defer_modulation(student), pytest.raises(ArgumentError, match="the teacher must be the deferred model or a"):
        TwinFlowLoss().backward(student, *make_batch("qwen_image", student, 4), teacher=teacher)


@pytest.mark.parametrize("rows, message", [
    (1, "in order, got a call with 1 rows of other times where student with 2"), (2, "got a call with 2 rows"),
    (0, "must make the calls of its plan, got one more"),
])  # fmt: skip
def test_calls_beside_the_plan_are_refused(rows, message):
    student = student_of("qwen_image")
    defer_modulation(student)
    x, cond, _ = make_batch("qwen_image", student, 2)

    def call(rows):
        t = torch.full((rows,), 0.01)
        student(x[:rows], t, t, {name: value[:rows] for name, value in cond.items()})

    blocks = student.network.transformer_blocks
    # Before the planned call has its embedding, or in the middle of the last planned call.
    place = student.network.img_in if rows else blocks[1]
    extra = place.register_forward_pre_hook(lambda *_: beside())
    waiting = [False, True] if rows else [True]  # the rehearsal passes the first place too, and not the blocks

    def beside():
        if waiting and waiting.pop(0):
            call(rows or 2)

    config = TwinFlowConfig(enhanced_ratio=0, estimate_order=0, adversarial=False, shares={"mul": 1.0})
    with pytest.raises(RuntimeError, match=message):
        TwinFlowLoss(config)(student, x, cond)
    extra.remove()
    with torch.no_grad():
        call(2)
