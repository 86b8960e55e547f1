"""Teachers of LoRA students of the real classes, whichever way peft is set up: held to copies made by hand."""

import copy
import gc

import pytest
import torch
from helpers.batches import gradients, move
from helpers.family_batches import FAMILIES, make_batch, relative
from helpers.teacher_cases import TEACHERS, R, T, answer
from helpers.tiny_pipelines import tiny_transformer
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from twinflow import EMATeacher, FrozenTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.lora import add_lora
from twinflow.models import load
from twinflow.teachers.adapter_slot import adapter_layers

SETUPS = {
    "pattern": LoraConfig(r=2, target_modules="proj_out"),  # FLUX has single blocks with a layer of that name too
    "some blocks": LoraConfig(
        r=2, target_modules=["to_q"], layers_to_transform=[1], layers_pattern="transformer_blocks"
    ),
    "all but": LoraConfig(r=2, target_modules=["to_q"], exclude_modules=["transformer_blocks.0.attn.to_q"]),
    "ranks by layer": LoraConfig(
        r=2, target_modules=["to_q", "to_k"], rank_pattern={"to_q": 3}, alpha_pattern={"to_k": 9}
    ),
    "dora": LoraConfig(r=2, target_modules=["to_q"], use_dora=True),
    "modules to save": LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["norm_out"]),
    "biases": LoraConfig(r=2, target_modules=["to_q"], bias="lora_only"),
    "loha": LoHaConfig(r=2, target_modules=["to_q"]),
    "lokr": LoKrConfig(r=2, target_modules=["to_q"]),
}  # fmt: skip


def adapted(config, how, family="flux", mode="dual+sign", dtype=torch.float32):
    network = tiny_transformer(family).to(dtype)
    if how == "diffusers":
        network.add_adapter(config)
    else:
        network = get_peft_model(network, config)
    return move(load(network, conditioning=mode))


def state_of(student, slot="ema"):
    """Everything of a student that a teacher must leave alone."""
    active = {
        name: copy.copy(module._active_adapter)
        for name, module in student.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    own = {name: p for name, p in student.named_parameters() if f".{slot}" not in name}
    flags = {name: p.requires_grad for name, p in own.items()}
    return flags, active, {name: (id(p), p.data_ptr()) for name, p in own.items()}


BY_PEFT = {"modules to save", "biases", "loha", "lokr"}  # nothing but peft's own files holds them
CASES = [(setup, how) for setup in SETUPS for how in ("peft", "diffusers") if how == "peft" or setup not in BY_PEFT]


@pytest.mark.parametrize("setup, how", CASES)
def test_making_a_teacher_changes_nothing(setup, how):
    student = adapted(copy.deepcopy(SETUPS[setup]), how)
    batch = make_batch("flux", student, 4)
    before, expected, values = state_of(student), answer(student, batch), copy.deepcopy(student.state_dict())
    ema, frozen = EMATeacher(student, 0.9), FrozenTeacher(student)
    assert state_of(student) == before
    for name, value in student.state_dict().items():
        assert ".ema" in name or torch.equal(value, values[name])
    assert torch.equal(answer(student, batch), expected)
    assert relative(answer(ema, batch), expected) < 1e-6
    assert relative(answer(frozen, batch), expected) > 1e-4
    assert ema.parameters().keys() == {name for name, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("setup, how", CASES)
def test_the_average_is_the_one_by_hand(setup, how):
    """A copy of the student whose trainable tensors are averaged in float64 answers as the teacher does."""
    student = adapted(copy.deepcopy(SETUPS[setup]), how)
    batch, by_hand = make_batch("flux", student, 4), copy.deepcopy(student)
    teacher, decay = EMATeacher(student, 0.99), 0.0
    averages = {name: p.detach().double() for name, p in by_hand.named_parameters() if p.requires_grad}
    for _ in range(3):
        move(student)
        teacher.update()
        now = dict(student.named_parameters())
        averages = {name: decay * old + (1 - decay) * now[name].detach().double() for name, old in averages.items()}
        decay += (1 - decay) * (0.99 - decay) / 2
    with torch.no_grad():
        for name, value in averages.items():
            by_hand.get_parameter(name).copy_(value)
            torch.testing.assert_close(teacher.parameters()[name].double(), value, rtol=1e-5, atol=1e-6)
    assert relative(answer(teacher, batch), answer(by_hand, batch)) < 1e-5
    assert relative(answer(teacher, batch), answer(student, batch)) > 1e-3


@pytest.mark.parametrize("how", ["peft", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_frozen_teacher_is_the_base_with_the_conditioning_as_it_was(family, how):
    student = adapted(LoraConfig(r=2, target_modules=["to_q", "to_k"]), how, family)
    batch, by_hand = make_batch(family, student, 4), copy.deepcopy(student)
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    teacher = FrozenTeacher(student)
    move(student)
    teacher.update()
    assert relative(answer(teacher, batch), answer(by_hand, batch)) < 1e-6
    assert torch.equal(teacher.velocity(batch[0], T, R, batch[1], "rollout"), answer(student, batch))
    saved, resumed = teacher.state_dict(), FrozenTeacher(student)
    assert relative(answer(resumed, batch), answer(by_hand, batch)) > 1e-4
    resumed.load_state_dict(saved)
    assert torch.equal(answer(resumed, batch), answer(teacher, batch))


# What a call does and does not do.


@pytest.mark.parametrize("make", [TEACHERS["ema"], TEACHERS["frozen"]], ids=["ema", "frozen"])
@pytest.mark.parametrize("how", ["peft", "diffusers"])
def test_a_call_walks_over_nothing(how, make, monkeypatch):
    """No `set_adapter`, no `requires_grad_`, no enabling or disabling: slots are pointed at directly."""
    student = adapted(copy.deepcopy(SETUPS["modules to save" if how == "peft" else "pattern"]), how)
    teacher, batch = make(student), make_batch("flux", student, 4)
    before = state_of(student)

    def walked(*_args, **_more):
        raise AssertionError("a teacher's call walked over modules")

    for cls in (BaseTunerLayer, AuxiliaryTrainingWrapper, *{type(m) for m in student.modules()}):
        for name in ("set_adapter", "enable_adapters", "disable_adapters", "set_requires_grad"):
            if hasattr(cls, name):
                monkeypatch.setattr(cls, name, walked)
    monkeypatch.setattr(nn.Module, "requires_grad_", walked)
    monkeypatch.setattr(torch.Tensor, "requires_grad_", walked)
    teacher.update()
    for query in ("cfg", "rollout"):
        teacher.velocity(*batch[:1], T, R, batch[1], query)
    assert state_of(student) == before


class Allocations(TorchDispatchMode):
    """Sizes in bytes of the new storages that operations give."""

    def __init__(self, known):
        super().__init__()
        self.known, self.sizes = {p.untyped_storage().data_ptr() for p in known}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(value.untyped_storage().nbytes())
        return out


def live_bytes():
    gc.collect()
    found = {}
    for value in gc.get_objects():
        if type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided:
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("make", [TEACHERS["ema"], TEACHERS["frozen"]], ids=["ema", "frozen"])
@pytest.mark.parametrize("how", ["peft", "diffusers"])
def test_a_whole_step_allocates_nothing_like_the_base(how, make):
    """A base 200 times the adapters: teacher, forward, backward; nothing as large as one of its matrices is made."""
    network = tiny_transformer("sd3", num_attention_heads=32, caption_projection_dim=512)
    config = LoraConfig(r=1, target_modules=["attn.to_q", "attn.to_k"])
    if how == "diffusers":
        network.add_adapter(config)
    else:
        network = get_peft_model(network, config)
    student = move(load(network, conditioning="sign"))
    batch, criterion = make_batch("sd3", student, 1), TwinFlowLoss(TwinFlowConfig(shares={"any": 1}, adversarial=False))
    base = {name: (p, p.clone()) for name, p in student.named_parameters() if not p.requires_grad}
    size = sum(p.numel() * 4 for p, _ in base.values())
    matrix = student.network.transformer_blocks[0].attn.to_out[0].weight.numel() * 4
    assert size > 200 * sum(p.numel() * 4 for p in student.parameters() if p.requires_grad) and size > 50 * matrix
    before = live_bytes()
    with Allocations(student.parameters()) as seen:
        teacher = make(student)
        out = criterion.backward(student, *batch, teacher=teacher)
    gradients(student)
    del out
    assert len(seen.sizes) > 500 and max(seen.sizes) < matrix
    assert live_bytes() - before < size / 50
    for parameter, value in base.values():
        assert torch.equal(parameter, value) and parameter.grad is None


def test_an_exception_inside_a_call_leaves_the_student_as_it_was():
    student = add_lora(load(tiny_transformer("sd3")), 4, conditioning="dual+sign")
    teacher, batch = EMATeacher(student, 0.9), make_batch("sd3", student, 4)
    before, second = state_of(student), student.conditioning.second.linear_1.weight
    handle = student.network.transformer_blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer(teacher, batch)
    handle.remove()
    assert state_of(student) == before and student.conditioning.second.linear_1.weight is second
    assert student.conditioning._current() is None
    assert torch.isfinite(TwinFlowLoss()(move(student), *batch, teacher=teacher).loss)


@pytest.mark.parametrize("autocast", [True, False, None], ids=["peft", "peft without autocast", "diffusers"])
def test_both_slots_are_float32_on_a_bf16_base(autocast):
    network = tiny_transformer("sd3").to(torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "timestep_embedder.linear_1"])
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
    student = add_lora(load(tiny_transformer("sd3")), 4, conditioning="dual+sign")
    teacher = EMATeacher(student, 0.9)
    for _ in range(2):
        move(student)
        teacher.update()
    other = EMATeacher(student, 0.9, adapter="again")
    other.load_state_dict(teacher.state_dict())
    move(student)
    teacher.update(), other.update()
    for name, value in teacher.parameters().items():
        assert torch.equal(value, other.parameters()[name])


def test_a_refused_adapter_name_leaves_the_student_as_it_is():
    student = adapted(LoraConfig(r=2, target_modules=["to_q"]), "diffusers", "sd3", dtype=torch.bfloat16)
    student.network.get_submodule("transformer_blocks.0.attn.to_q").to(torch.bfloat16)
    before = {name: p.dtype for name, p in student.named_parameters()}
    with pytest.raises(ValueError, match="EMATeacher: adapter must be a name that is not taken, got 'default'"):
        EMATeacher(student, 0.9, adapter="default")
    assert {name: p.dtype for name, p in student.named_parameters()} == before
    with pytest.raises(ValueError, match="adapter must be None where the student trains no adapter, got 'ema'"):
        EMATeacher(load(tiny_transformer("sd3"), conditioning="dual"), 0.9, adapter="ema")
    assert EMATeacher(student, 0.9, adapter="slow").adapter == "slow"
    assert all("slow" in layer.lora_A for layer in adapter_layers(student).values())


def test_names_in_a_state_are_those_without_compilation():
    """Blocks that torch.compile wraps, all weights or a LoRA: one state fits both, so does one of earlier versions."""
    for full in (False, True):
        plain, compiled = (load(tiny_transformer("sd3"), conditioning="sign" if full else None) for _ in range(2))
        if not full:
            plain, compiled = add_lora(plain, rank=2), add_lora(compiled, rank=2)
        blocks = compiled.transformer.transformer_blocks
        for k, block in enumerate(blocks):
            blocks[k] = torch.compile(block, backend="eager")
        move(compiled)
        teacher = EMATeacher(compiled, 0.9)
        state, before = teacher.state_dict(), EMATeacher(plain, 0.9)
        assert not any("_orig_mod" in name for name in state["shadow"])
        marked = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in state["shadow"].items()}
        for shadow in (state["shadow"], marked):
            before.load_state_dict(state | {"shadow": shadow})
            assert all(torch.equal(value, state["shadow"][name]) for name, value in before.parameters().items())
        teacher.load_state_dict(before.state_dict())
