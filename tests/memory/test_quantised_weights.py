"""Packed weights: their bytes, the libraries' own values, and who shares, copies and saves them."""

import copy
import pickle

import bitsandbytes.functional
import pytest
import torch
import torchao.quantization
from helpers.family_batches import make_batch, relative
from helpers.memory_cases import student_of
from helpers.quantised_cases import ERROR, FORMS, TIMES, linear, pair, partly_trained
from safetensors.torch import load_file, save_file
from torch import nn

from twinflow import EMATeacher, FrozenTeacher
from twinflow.memory.quantised_base import quantise_base, quantised_form
from twinflow.memory.quantised_linear import dequantised, pack


@pytest.mark.parametrize("form, rate", [("nf4", 4 + 8 / 64 + 32 / (64 * 256)), ("int8", 8 + 32 / 512)])
def test_bytes_are_those_of_the_form(form, rate):
    weight = nn.Parameter(torch.randn(768, 512), requires_grad=False)
    pack(weight, form)
    parts = {"nf4": [768 * 256, 768 * 8, 4 * 24, 4], "int8": [768 * 512, 4 * 768]}[form]
    assert weight.numel() == sum(-(-part // 16) * 16 for part in parts)
    assert 8 * weight.numel() / (768 * 512) == pytest.approx(rate, rel=1e-3)
    student = student_of("sd3", True)
    before = dict(student.named_parameters())
    sizes = {name: p.numel() * 4 for name, p in before.items()}
    base = quantise_base(student, form)
    names = [next(n for n in (f"{name}.weight", f"{name}.base_layer.weight") if n in before) for name in base.layers]
    assert base.bytes_before == sum(sizes[name] for name in names)
    assert base.bytes_after == sum(before[name].untyped_storage().nbytes() for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns", [(64, 128), (192, 64), (3072, 64)])
def test_values_are_the_libraries_own(rows, columns, dtype):
    layer = nn.Linear(columns, rows, dtype=dtype).requires_grad_(False)
    nf4, int8 = copy.deepcopy(layer.weight), copy.deepcopy(layer.weight)
    pack(nf4, "nf4")
    codes, state = bitsandbytes.functional.quantize_4bit(layer.weight, compress_statistics=True, quant_type="nf4")
    assert torch.equal(dequantised(nf4), bitsandbytes.functional.dequantize_4bit(codes, state))
    pack(int8, "int8")
    torchao.quantization.quantize_(layer, torchao.quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    assert torch.equal(dequantised(int8), layer.weight.dequantize())
    assert dequantised(nf4).dtype == dequantised(int8).dtype == dtype


@pytest.mark.parametrize("columns", [16, 31, 32, 96, 130])
@pytest.mark.parametrize("form", FORMS)
def test_rows_that_no_block_of_64_ends_with(form, columns):
    weight = nn.Parameter(torch.randn(64, columns), requires_grad=False)
    before = weight.data.clone()
    pack(weight, form)
    assert ERROR[form][0] < relative(dequantised(weight), before) < ERROR[form][1]


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_and_shapes(form):
    layer, plain = nn.Linear(48, 40).requires_grad_(False), nn.Linear(48, 40).requires_grad_(False)
    pack(layer.weight, form)
    plain.load_state_dict({"weight": dequantised(layer.weight), "bias": layer.bias})
    layer.weight.data = layer.weight.data.clone()  # as moving to another device does
    for shape in ((48,), (3, 48), (2, 3, 48), (2, 3, 5, 48), (0, 48)):
        x = torch.randn(shape, requires_grad=True)
        found = []
        for each in (layer, plain):
            (dx,) = torch.autograd.grad(each(x).pow(3).sum(), x, create_graph=True)
            found += [each(x), dx, *torch.autograd.grad(dx.square().sum(), x)]
        assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True)), shape


@pytest.mark.parametrize("make", [lambda: student_of("qwen_image", True), partly_trained], ids=["lora", "copy"])
@pytest.mark.parametrize("kind", [lambda student: EMATeacher(student, 0.9), FrozenTeacher], ids=["ema", "frozen"])
def test_a_teacher_made_before_or_after_has_the_same_base(make, kind):
    quantised, plain, base = pair(make, "nf4")
    early = make()
    before = kind(early)
    assert quantise_base(early, "nf4") == base
    x, cond, _ = make_batch("qwen_image", plain, 2)
    expected = kind(plain).velocity(x, *TIMES, cond, "rollout")
    assert torch.equal(before.velocity(x, *TIMES, cond, "rollout"), expected)
    after = kind(quantised)
    assert torch.equal(after.velocity(x, *TIMES, cond, "rollout"), expected)
    for teacher, student in ((before, early), (after, quantised)):
        module = getattr(teacher, "module", student)
        assert all(linear(module, name).weight is linear(student, name).weight for name in base.layers)


def test_copies_pickles_and_casts():
    student = student_of("sd3", True)
    base = quantise_base(student, "nf4")
    x, cond, _ = make_batch("sd3", student, 2)
    expected = student(x, *TIMES, cond)
    twin = copy.deepcopy(student)
    assert all(linear(twin, n).weight.data_ptr() != linear(student, n).weight.data_ptr() for n in base.layers)
    assert torch.equal(twin(x, *TIMES, cond), expected)
    layer = linear(student, base.layers[0])
    loaded = pickle.loads(pickle.dumps(layer))
    assert torch.equal(loaded(torch.ones(layer.in_features)), layer(torch.ones(layer.in_features)))
    bits = layer.weight.data.clone()
    student.to(torch.bfloat16)
    assert torch.equal(layer.weight.data, bits) and quantised_form(student) == "nf4"
    student(x, *TIMES, {key: value.bfloat16() for key, value in cond.items()})


def test_a_state_dict_holds_the_bytes(tmp_path):
    student, other = student_of("sd3", True), student_of("sd3", True, seed=1)
    base = quantise_base(student, "nf4")
    state = student.state_dict()
    name = next(n for n in state if n.startswith(base.layers[0]) and n.endswith("weight"))
    assert type(state[name]) is torch.Tensor and state[name].dtype == torch.uint8 and state[name].dim() == 1
    save_file(state, tmp_path / "state.safetensors")
    x, cond, _ = make_batch("sd3", student, 2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    quantise_base(other, "nf4")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other(x, *TIMES, cond), student(x, *TIMES, cond))
