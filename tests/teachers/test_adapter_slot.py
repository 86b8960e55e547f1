"""A LoRA student's teacher: a second adapter on the same base, which a call neither copies nor changes."""

import pytest
import torch
from helpers.family_batches import make_batch
from helpers.tiny_pipelines import tiny_transformer
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from twinflow import EMATeacher, FrozenTeacher, TwinFlowLoss
from twinflow.lora import add_lora
from twinflow.models import load
from twinflow.teachers.adapter_slot import adapter_layers

TARGETS = ["to_q", "to_k", "timestep_embedder.linear_1"]


def lora_student(mode="dual+sign", family="sd3", **options):
    return add_lora(load(tiny_transformer(family)), 4, conditioning=mode, **options)


@torch.no_grad()
def move(student):
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn_like(parameter)


def state_of(student):
    flags = {name: p.requires_grad for name, p in student.named_parameters() if ".ema." not in name}
    return flags, {name: list(layer.active_adapters) for name, layer in adapter_layers(student).items()}


def answer(network, batch, t=0.7, r=0.2):
    latents, cond, _ = batch
    rows = len(latents)
    return network(latents, torch.full((rows,), t), torch.full((rows,), r), cond)


@pytest.mark.parametrize("make", [lambda s: EMATeacher(s, 0.9), FrozenTeacher], ids=["ema", "frozen"])
def test_a_step_leaves_base_flags_and_active_adapters_as_they_are(make):
    student = lora_student()
    before = state_of(student)
    teacher = make(student)
    assert state_of(student) == before
    base = {name: (p, p.data_ptr(), p.clone()) for name, p in student.named_parameters() if not p.requires_grad}
    move(student)
    TwinFlowLoss().backward(student, *make_batch("sd3", student, 4), teacher=teacher)
    assert state_of(student) == before
    named = dict(student.named_parameters())
    for name, (parameter, pointer, value) in base.items():
        assert named[name] is parameter and parameter.data_ptr() == pointer
        if ".ema." not in name:
            assert torch.equal(parameter, value)


def test_slots_answer_with_their_own_weights():
    student = lora_student()
    move(student)
    batch = make_batch("sd3", student, 4)
    ema, frozen = EMATeacher(student, 0.9), FrozenTeacher(student)
    with torch.no_grad():
        before = answer(student, batch)
        for layer in adapter_layers(student).values():
            layer.enable_adapters(False)
        plain = answer(student, batch)
        for layer in adapter_layers(student).values():
            layer.enable_adapters(True)
            for name in ("lora_A", "lora_B"):
                getattr(layer, name)["ema"].requires_grad_(False)
        student.conditioning.requires_grad_()
        move(student)
        after = answer(student, batch)
        assert not torch.equal(before, after)
        assert torch.equal(answer(ema, batch), before) and torch.equal(answer(frozen, batch), plain)
        assert torch.equal(answer(student, batch), after)


def test_an_exception_inside_a_call_leaves_the_student_as_it_was():
    student = lora_student()
    teacher = EMATeacher(student, 0.9)
    before, second = state_of(student), student.conditioning.second.linear_1.weight
    handle = student.network.transformer_blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer(teacher, make_batch("sd3", student, 4))
    handle.remove()
    assert state_of(student) == before and student.conditioning.second.linear_1.weight is second
    assert student.conditioning._times is None
    move(student)
    assert torch.isfinite(TwinFlowLoss()(student, *make_batch("sd3", student, 4), teacher=teacher).loss)


@pytest.mark.parametrize("autocast", [True, False, None], ids=["peft", "peft without autocast", "diffusers"])
def test_both_slots_are_float32_on_a_bf16_base(autocast):
    network = tiny_transformer("sd3").to(torch.bfloat16)
    config = LoraConfig(r=4, target_modules=TARGETS)
    if autocast is None:
        network.add_adapter(config)
    else:
        network = get_peft_model(network, config, autocast_adapter_dtype=autocast)
    student = load(network, conditioning="dual")
    teacher = EMATeacher(student, 0.9)
    dtypes = {p.dtype for name, p in student.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32} and {v.dtype for v in teacher.parameters().values()} == {torch.float32}
    assert student.network.time_text_embed.timestep_embedder.linear_2.weight.dtype == torch.bfloat16
    exported = get_peft_model_state_dict(student.network, adapter_name="default")
    assert exported and not any("ema" in name for name in exported)


def test_a_state_continues_bit_for_bit():
    student = lora_student()
    teacher = EMATeacher(student, 0.9)
    for _ in range(2):
        move(student)
        teacher.update()
    saved = teacher.state_dict()
    other = EMATeacher(student, 0.9, adapter="again")
    other.load_state_dict(saved)
    move(student)
    teacher.update()
    other.update()
    for name, value in teacher.parameters().items():
        assert torch.equal(value, other.parameters()[name])


def test_wrong_adapters():
    student = lora_student()
    with pytest.raises(ValueError, match="adapter must be a name that is not taken, got 'default'"):
        EMATeacher(student, 0.9, adapter="default")
    with pytest.raises(ValueError, match="adapter must be None where the student trains no adapter, got 'ema'"):
        EMATeacher(load(tiny_transformer("sd3"), conditioning="dual"), 0.9, adapter="ema")
    with pytest.raises(ValueError, match="adapter must be a name that is not taken, got 'default'"):
        add_lora(student)
    with pytest.raises(ValueError, match="targets must name layers of SD3Transformer2DModel"):
        add_lora(load(tiny_transformer("sd3")), targets=("nothing",))
