"""Deferred modulation: what it refuses, when it is attached and later."""

import pytest
import torch
from helpers.deferred_cases import assert_equal, backward_once, student_of, trained
from helpers.family_batches import make_batch, make_student
from helpers.tiny_pipelines import tiny_transformer
from torch import distributed, nn

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
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


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: nn.Linear(2, 2), TypeError, "student must be from twinflow.models.load, got Linear"),
        (lambda: student_of("sana"), ValueError, "modulation layers that read its time embedding, got sana without"),
        (lambda: make_student("sd3"), ValueError,
         r"modulation must be frozen, got training of transformer_blocks\.0\.norm1\.linear and 4 more; leave"),
        (lambda: with_lora_on("txt_mod.1", "to_q"), ValueError,
         r"must be frozen, got training of transformer_blocks\.0\.txt_mod\.1 and 1 more; leave .* or do without"),
        (lambda: with_lora_on("norm_out.linear").requires_grad_(False), ValueError,
         r"plain linear layers, got Linear with torch.float32 at norm_out\.linear; .* merge an adapter"),
        (lambda: changed(as_quantised), ValueError, r"plain linear layers, got Linear with torch\.uint8 at norm_out"),
        (lambda: changed(defer_modulation), ValueError, "must not be deferred yet, got one that is"),
    ],
)  # fmt: skip
def test_students_that_cannot_be_deferred(make, error, message):
    student = make()
    with pytest.raises(error, match=message):
        defer_modulation(student)


def test_packed_modulation_is_refused():
    student = student_of("qwen_image")
    quantise_base(student, "int8")
    message = r"must be whole weights, got int8 at transformer_blocks\.0\.img_mod\.1 and 3 more; .* skip=student\.modul"
    with pytest.raises(ValueError, match=message):
        defer_modulation(student)


def test_two_embeddings_a_row_are_refused():
    student = load(tiny_transformer("qwen_image", zero_cond_t=True).requires_grad_(False))
    with pytest.raises(ValueError, match="must have one time embedding a row, got an edit model with two"):
        defer_modulation(student)


def test_sharded_models_are_refused(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student = student_of("sd3")
        layer = student.network.proj_out
        mesh = distributed.init_device_mesh("cpu", (1,))
        layer.weight = nn.Parameter(distributed.tensor.distribute_tensor(layer.weight.data, mesh), requires_grad=False)
        with pytest.raises(ValueError, match="must be whole on its device, got a sharded model"):
            defer_modulation(student)
    finally:
        distributed.destroy_process_group()


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device must be cuda or cpu where the student has data, got xpu"):
        defer_modulation(student_of("sd3"), device="xpu")


@pytest.mark.parametrize(
    "move",
    [lambda s: s.to(torch.float64), lambda s: s.network.half(), lambda s: s.transformer.to("meta"),
     lambda s: s.network.norm_out.linear.double()],
)  # fmt: skip
def test_moving_and_casting_are_refused(move):
    student = student_of("sd3")
    plain = trained(student_of("sd3"), 1)
    with defer_modulation(student):
        with pytest.raises(
            RuntimeError, match=r"must stay on cpu and in its dtype .* got a change to .*; remove\(\) the"
        ):
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
    with (
        defer_modulation(student),
        pytest.raises(ValueError, match=r"the teacher must compute with the model .* make the teacher after deferring"),
    ):
        TwinFlowLoss().backward(student, *make_batch("qwen_image", student, 4), teacher=teacher)


@pytest.mark.parametrize(
    "rows, message",
    [(1, "in order, got a call with 1 rows of other times where student with 2"), (2, "got a call with 2 rows"),
     (0, "must make the calls of its plan, got one more")],
)  # fmt: skip
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


def test_a_forecasts_device_is_for_forecasts():
    with pytest.raises(ValueError, match="device must be cuda or cpu where the student has data, got meta"):
        defer_modulation(student_of("sd3"), device="meta")
