"""Adapters keep float32 weights and compute in the dtype of their input."""

import copy

import pytest
import torch
from helpers.family_batches import make_batch, make_student
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from twinflow import EMATeacher, TwinFlowLoss
from twinflow.adapters import FollowingLinear, compute_in_input_dtype
from twinflow.lora import add_lora
from twinflow.teachers.adapter_slot import adapter_layers


def adapted(dtype: torch.dtype, **options) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).to(dtype).requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, **options)
    return inject_adapter_in_model(config, base)


def as_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def follow(model: nn.Module) -> None:
    for layer in adapter_layers(model).values():
        compute_in_input_dtype(layer)


def test_nothing_changes_in_float32():
    plain = adapted(torch.float32)
    following = copy.deepcopy(plain)
    follow(following)
    x = torch.randn(4, 8, requires_grad=True)
    outputs = [model(x) for model in (plain, following)]
    assert torch.equal(*outputs)
    grads = [torch.autograd.grad(out.sum(), [x, *(p for p in m.parameters() if p.requires_grad)])
             for out, m in zip(outputs, (plain, following), strict=True)]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_half_precision_is_what_autocast_computes():
    model = adapted(torch.bfloat16)
    as_float32(model)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    follow(model)
    out = model(x)
    layer = model[0]
    a, b = (getattr(layer, place)["default"].weight for place in ("lora_A", "lora_B"))
    low = (x @ a.bfloat16().T) @ b.bfloat16().T
    assert torch.equal(layer(x), layer.base_layer(x) + low * layer.scaling["default"])
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_no_float32_copy_of_an_input_is_kept():
    model = adapted(torch.bfloat16)
    as_float32(model)
    x = torch.randn(64, 8, dtype=torch.bfloat16)

    def kept() -> list[tuple]:
        found = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.append((t.dtype, tuple(t.shape))) or t, lambda t: t
        ):
            model(x)
        return found

    assert (torch.float32, (64, 8)) in kept()  # peft's own
    follow(model)
    assert not [shape for dtype, shape in kept() if dtype == torch.float32 and 64 in shape]


def test_other_kinds_keep_the_casts_of_peft():
    dora = adapted(torch.bfloat16, use_dora=True)
    follow(dora)
    assert all(layer.cast_input_dtype_enabled for layer in adapter_layers(dora).values())
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), conv)
    follow(conv)
    assert type(conv[0].lora_A["default"]) is nn.Conv2d and conv[0].cast_input_dtype_enabled


def test_student_teacher_and_style_follow():
    student = add_lora(make_student("qwen_image", dtype=torch.bfloat16), rank=2)
    teacher = EMATeacher(student, 0.9)
    layers = adapter_layers(student.network).values()
    linear = [layer for layer in layers if isinstance(layer.base_layer, nn.Linear)]
    assert linear and all(
        type(layer.lora_A[name]) is FollowingLinear and layer.lora_A[name].weight.dtype == torch.float32
        for layer in linear
        for name in ("default", "ema")
    )
    batch = make_batch("qwen_image", student, 4, torch.bfloat16)
    out = TwinFlowLoss().backward(student, *batch, teacher=teacher)
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast(dtype):
    model = adapted(dtype)
    as_float32(model)
    follow(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(4, 8))
    assert out.dtype == torch.bfloat16
