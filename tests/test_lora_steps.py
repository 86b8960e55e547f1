"""Steps of LoRA students of the real classes: schedules, a user's own LoRA beneath, a quantised base."""

import pytest
import torch
from helpers.batches import gradients, move
from helpers.family_batches import FAMILIES, make_batch, make_student, relative
from helpers.teacher_cases import TEACHERS, T, answer
from helpers.tiny_pipelines import tiny_transformer
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from twinflow import EMATeacher, FrozenTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.conditioning import MODES
from twinflow.lora import add_lora
from twinflow.models import load


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planned_step_is_the_published_one_and_the_one_by_rows(family, kind):
    """Same loss and gradients; without the 1/delta that would amplify the rounding of other batch compositions."""
    student = move(add_lora(make_student(family), 2, conditioning="dual+sign"))
    batch, config = make_batch(family, student, 8), TwinFlowConfig(delta_t=0.5)
    teacher, criterion, results = TEACHERS[kind](student), TwinFlowLoss(config), []
    move(student)
    draws = criterion.draw(batch[0])
    for how in ({}, {"schedule": "published"}, {"micro_batch": 1}, {"micro_batch": 3}):
        arguments = dict(teacher=teacher, draws=draws, update_teacher=False) | how
        if "micro_batch" in how:
            out = criterion.backward(student, *batch, **arguments)
        else:
            out = criterion(student, *batch, **arguments)
            out.loss.backward()
        results.append((out.loss.item(), {n: g for n, g in gradients(student).items() if g.any()}))
    (loss, expected), *others = results
    size = torch.stack([value.norm() for value in expected.values()]).norm()
    assert len(expected) > 10
    for other_loss, found in others:
        assert other_loss == pytest.approx(loss, rel=1e-4)
        assert found.keys() == expected.keys()
        assert all((found[name] - value).norm() < 1e-4 * size for name, value in expected.items())


def test_a_users_own_lora_stays_under_student_and_teachers(tmp_path):
    """base_lora: active and frozen in all three, and no part of what is averaged or exported."""
    styled = move(add_lora(make_student("sd3"), 3, conditioning=None))
    tensors = get_peft_model_state_dict(styled.network, adapter_name="default")
    save_file(
        {f"transformer.{name}": value.contiguous() for name, value in tensors.items()}, tmp_path / "style.safetensors"
    )
    student = add_lora(make_student("sd3"), 2, conditioning="dual+sign", base_lora=tmp_path / "style.safetensors")
    batch = make_batch("sd3", student, 4)
    expected = answer(styled, batch, T, T)
    ema, frozen = EMATeacher(student, 0.9), FrozenTeacher(student)
    for network in (student, ema, frozen):
        assert relative(answer(network, batch, T, T), expected) < 1e-5
    assert relative(answer(make_student("sd3"), batch, T, T), expected) > 1e-2
    style = {name: p.clone() for name, p in student.named_parameters() if ".base." in name}
    out = TwinFlowLoss()(student, *batch, teacher=ema)
    out.loss.backward()
    torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2).step()
    ema.update()
    ema.update()
    assert style and not any(".base." in name for name in ema.parameters())
    assert all(torch.equal(student.get_parameter(name), value) for name, value in style.items())
    assert relative(answer(frozen, batch, T, T), expected) < 1e-5
    assert (
        relative(answer(ema, batch, T, T), expected) > 1e-4 and relative(answer(student, batch, T, T), expected) > 1e-4
    )
    exported = get_peft_model_state_dict(student.network, adapter_name="default")
    assert not any(".ema" in name or ".base" in name or "base_model" in name for name in exported)


class Int8Linear(nn.Linear):
    """A linear layer whose weight is an int8 buffer with a scale per row, as a quantised base has one."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        del self.weight
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_base_is_never_touched(mode):
    """Blocks of int8 weights under adapters, teachers and a step: the same tensors, bit for bit."""
    from twinflow import EMATeacher, FrozenTeacher, TwinFlowLoss

    network = tiny_transformer("sd3")
    for name, module in list(network.transformer_blocks.named_modules()):
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(network.transformer_blocks.get_submodule(parent), child, Int8Linear(module))
    base = {
        name: (value.data_ptr(), value.clone()) for name, value in network.named_buffers() if value.dtype == torch.int8
    }
    student = add_lora(load(network), 2, conditioning=mode)
    batch = make_batch("sd3", student, 4)
    for teacher in (EMATeacher(student, 0.9), FrozenTeacher(student)):
        out = TwinFlowLoss().backward(student, *batch, teacher=teacher)
        assert torch.isfinite(out.loss)
    assert any(
        p.grad is not None and p.grad.any() for name, p in student.named_parameters() if "transformer_blocks" in name
    )
    now = {name.replace(".base_layer", ""): value for name, value in student.network.named_buffers()}
    assert len(base) > 10
    for name, (pointer, value) in base.items():
        assert now[name].data_ptr() == pointer and torch.equal(now[name], value)
