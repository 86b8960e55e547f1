"""Quantised students, and plain ones with the weights that the packed ones stand for."""

import torch
from helpers.family_batches import make_student, relative
from torch import nn

from twinflow.memory.quantised_base import QuantisedBase, quantise_base
from twinflow.memory.quantised_linear import dequantised

FORMS = ("nf4", "int8")
ERROR = {"nf4": (0.07, 0.11), "int8": (0.003, 0.01)}  # of normal weights, relative
Q = "transformer.transformer_blocks.0.attn.to_q"
TIMES = torch.tensor([0.9, 0.3]), torch.tensor([0.2, 0.3])


def linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    return getattr(layer, "base_layer", layer)


def pair(make, form: str) -> tuple[nn.Module, nn.Module, QuantisedBase]:
    """A quantised student, and a plain one with the weights that its packed ones stand for."""
    quantised, plain = make(), make()
    base = quantise_base(quantised, form)
    for name in base.layers:
        weight, before = dequantised(linear(quantised, name).weight), linear(plain, name).weight
        assert ERROR[form][0] < relative(weight.float(), before.float()) < ERROR[form][1], name
        before.data.copy_(weight)
    return quantised, plain, base


def partly_trained(family: str = "qwen_image"):
    """A student without adapters that trains some layers of its first block, biases of frozen layers among them."""
    torch.manual_seed(0)
    student = make_student(family, conditioning="dual")
    student.transformer.requires_grad_(False)
    student.conditioning.requires_grad_()
    block = next(iter(student.network.transformer_blocks))
    block.attn.to_k.requires_grad_()
    block.attn.to_q.bias.requires_grad_()
    return student
