"""What `quantise_base` leaves alone, and what it refuses."""

import logging
import sys

import bitsandbytes.functional
import pytest
import torch
import torchao.quantization
from helpers.deferred_cases import assert_equal, trained
from helpers.family_batches import make_student
from helpers.memory_cases import student_of
from helpers.quantised_cases import Q, linear
from helpers.tiny_pipelines import tiny_transformer
from peft import LoraConfig
from torch import nn

from twinflow import EMATeacher
from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.export import export
from twinflow.lora import add_lora
from twinflow.memory.modulation.defer import defer_modulation
from twinflow.memory.quantised_base import quantise_base, quantised_form
from twinflow.memory.quantised_linear import PackedWeight, load_library
from twinflow.models import load


def test_adapters_and_skipped_layers_stay(tmp_path):
    export(add_lora(make_student("sd3"), rank=2, conditioning=None), tmp_path / "style")
    torch.manual_seed(0)
    student = add_lora(make_student("sd3", conditioning="dual+sign"), rank=2, base_lora=tmp_path / "style")
    EMATeacher(student, 0.9)
    others = {n: p.data.clone() for n, p in student.named_parameters() if "lora_" in n or "base_layer" not in n}
    base = quantise_base(student, "int8", device="cpu", skip=[Q, f"{Q.replace('to_q', 'to_k')}.base_layer"])
    assert not any("lora_" in name or name.startswith((Q, Q.replace("to_q", "to_k"))) for name in base.layers)
    packed = {n for n, p in student.named_parameters() if isinstance(p, PackedWeight)}
    assert f"{Q}.base_layer.weight" not in packed and f"{Q}.base_layer.weight".replace("to_q", "to_v") in packed
    assert len(packed) == len(base.layers)
    for name, parameter in student.named_parameters():
        assert name in packed or name not in others or torch.equal(parameter, others[name]), name


def test_frozen_adapters_of_plain_layers_stay():
    """As peft makes them, before a teacher or `add_lora` changes their class."""
    transformer = tiny_transformer("sd3").requires_grad_(False)
    config = LoraConfig(r=4, target_modules=["to_q"])
    transformer.add_adapter(config, "style")
    transformer.requires_grad_(False)
    transformer.add_adapter(config, "default")
    student = load(transformer)
    layer = student.get_submodule(Q)
    assert type(layer.lora_A["style"]) is nn.Linear and not layer.lora_A["style"].weight.requires_grad
    assert not any("lora_" in name for name in quantise_base(student, "int8").layers)


def test_deferred_modulation_must_be_skipped():
    student = student_of("qwen_image", True)
    handle = defer_modulation(student)
    with pytest.raises(ValueError, match=r"mod\.1 must have its own forward, got another, .*; name it in skip"):
        quantise_base(student.network)
    skip = [name for name in dict(student.network.named_modules()) if name.endswith("mod.1")]
    base = quantise_base(student.network, skip=skip)
    assert not set(base.layers) & set(skip) and len(skip) == 2 * len(student.network.transformer_blocks)
    deferred = trained(student, 2, 1)
    handle.remove()
    plain = student_of("qwen_image", True)
    quantise_base(plain.network, skip=skip)
    assert_equal(deferred, trained(plain, 2, 1))


def lora():
    return student_of("sd3", True)


def replaced(change):
    student = student_of("sd3", True)
    layer = student.get_submodule(Q)
    layer.base_layer = change(layer.base_layer)
    return student


def by_torchao(layer):
    torchao.quantization.quantize_(layer, torchao.quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    return layer


def by_bitsandbytes(layer):
    return bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features)


def of_dtype(dtype):
    def change(layer):
        layer.weight.data = layer.weight.data.to(dtype)
        return layer

    return change


def on_meta():
    with torch.device("meta"):
        student = load(tiny_transformer("sd3"))
    student.requires_grad_(False)
    return student


def quantised_already(form="nf4"):
    student = student_of("sd3", True)
    quantise_base(student, form)
    return student


@pytest.mark.parametrize("make, options, argument, parts", [
    (lambda: 3, {}, "model", "an nn.Module, got int"),
    (lora, {"form": "fp8"}, "form", "one of nf4, int8, got 'fp8'"),
    (lora, {"skip": "to_q"}, "skip", "a collection of names, got 'to_q'"),
    (lora, {"skip": ["nothing"]}, "skip", "must name linear layers of the model, got 'nothing'"),
    (lambda: student_of("sd3", False), {}, "model", "not skipped, got none; freeze the base: add a LoRA first"),
    (lambda: nn.Linear(2, 2), {}, "model", "repeated_blocks: model must hold repeated blocks"),
    (quantised_already, {}, "model", "in nf4 already; load it again"),
    (quantised_already, {"form": "int8"}, "model", "in nf4 already; load it again"),
    (lambda: replaced(by_torchao), {}, "model", f"got {Q}.base_layer quantised by torchao (Int8T"),
    (lambda: replaced(by_bitsandbytes), {}, "model", "by bitsandbytes (Params4bit in Linear4bit); load it in bf16 and"),
    (lambda: replaced(of_dtype(torch.float8_e4m3fn)), {}, "model", "quantised by its owner, as torch.float8_e4m3fn"),
    (lambda: replaced(of_dtype(torch.float64)), {}, f"{Q}.base_layer", "bfloat16 or float16, got torch.float64"),
    (on_meta, {}, "transformer.transformer_blocks.0.norm1.linear", "got one on the meta device; load it first"),
])  # fmt: skip
def test_refusals(make, options, argument, parts):
    model = make()
    parameters = [*model.parameters()] if isinstance(model, nn.Module) else []
    before = [(p._version, type(p)) for p in parameters]
    with pytest.raises((ArgumentError, ArgumentTypeError)) as error:
        quantise_base(model, **options)
    assert error.value.argument == argument and parts in str(error.value)
    assert before == [(p._version, type(p)) for p in parameters]


def test_sharded_weights(one_rank):
    student = student_of("sd3", True)
    layer = student.get_submodule(Q).base_layer
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = torch.distributed.tensor.distribute_tensor(layer.weight.data, mesh)
    layer.weight = nn.Parameter(sharded, requires_grad=False)
    with pytest.raises(ArgumentError, match=f"{Q}.base_layer must have a whole weight, got a sharded one"):
        quantise_base(student)


@pytest.mark.parametrize("form, name", [("nf4", "bitsandbytes"), ("int8", "torchao")])
def test_a_missing_library_is_named(monkeypatch, form, name):
    load_library.cache_clear()
    monkeypatch.setitem(sys.modules, name, None)
    student = student_of("sd3", True)
    with pytest.raises(ImportError, match=rf"quantise_base: {name} must be installed \(pip install 'twinflow\[quant"):
        quantise_base(student, form)
    assert quantised_form(student) is None


def test_loggers_keep_their_levels():
    load_library.cache_clear()
    logging.getLogger("torchao").setLevel(logging.INFO)
    load_library("torchao", "test")
    assert logging.getLogger("torchao").level == logging.INFO
    logging.getLogger("torchao").setLevel(logging.NOTSET)


def test_a_layer_that_something_else_multiplies_with_fails():
    """Never a product with codes as if they were weights."""
    layer = linear(quantised_already(), Q)
    with pytest.raises(RuntimeError):
        torch.ones(2, layer.in_features) @ layer.weight.t()
