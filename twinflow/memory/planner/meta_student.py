"""`meta_student()`: a student and its teacher on the meta device, as a training run would make them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from twinflow.lora import add_lora
from twinflow.memory.blocks import repeated_blocks
from twinflow.memory.planner.architectures import Architecture
from twinflow.memory.planner.workload import Workload
from twinflow.models import FlowModel, load
from twinflow.teacher import EMATeacher

META = torch.device("meta")
# What a quantised weight takes, bits: int8 with a bf16 scale per output, nf4 with doubly quantised scales per 64.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


class QuantisedLinear(nn.Linear):
    """A frozen linear layer that stands for a weight-only quantised one: it makes the bf16 weight anew for each use."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Dequantised.apply(x, self.weight, self.bias, self.out_features)


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, rows: int) -> torch.Tensor:
        ctx.shape = (rows, x.shape[-1])
        return F.linear(x, x.new_empty(ctx.shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad @ grad.new_empty(ctx.shape), None, None, None


def meta_student(workload: Workload, architecture: Architecture) -> FlowModel:
    """A student of an architecture, made and conditioned as training would.

    Args:
        workload: how it is trained.
        architecture: the workload's own, or a reduction of it.
    """
    return as_trained(meta_network(architecture, workload.base), workload, workload.conditioning)


def meta_network(architecture: Architecture, base: str) -> FlowModel:
    """A model of an architecture as it is loaded, without conditioning or adapters.

    Args:
        architecture: the model, or a reduction of it.
        base: one of `twinflow.memory.planner.workload.BASES`; a quantised one is loaded in bf16.
    """
    import diffusers

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if base == "float32" else torch.bfloat16)
    try:
        with META:
            transformer = getattr(diffusers, architecture.transformer)(**architecture.config)
    finally:
        torch.set_default_dtype(before)
    for name, buffer in transformer.named_buffers():
        if name in transformer.state_dict() and buffer.is_floating_point():  # as loading from a file gives it
            buffer.data = buffer.data.to(transformer.dtype)
    return load(transformer)


def as_trained(network: FlowModel, workload: Workload, conditioning: str | None) -> FlowModel:
    """Gives a model the conditioning and the LoRA of a workload.

    Args:
        network: from `meta_network`.
        workload: how it is trained.
        conditioning: its mode; None: it stays plain.
    """
    if workload.lora_rank is not None:
        add_lora(network, workload.lora_rank, targets=workload.lora_targets, conditioning=conditioning)
    elif conditioning is not None:
        network.condition(conditioning)
    quantise(network, workload.base)
    return network


def quantise(network: FlowModel, base: str) -> None:
    """Every frozen linear layer inside the repeated blocks holds packed weights, where the base has them."""
    if base not in ("int8", "nf4"):
        return
    bits = 8 if base == "int8" else NF4_BITS
    for block in repeated_blocks(network.network).values():
        for layer in block.modules():
            if type(layer) is nn.Linear and not layer.weight.requires_grad:
                scales = 2 * layer.out_features if bits == 8 else 0
                count = int(layer.weight.numel() * bits / 8) + scales
                layer.weight = nn.Parameter(torch.empty(count, dtype=torch.uint8, device=META), requires_grad=False)
                layer.__class__ = QuantisedLinear


def meta_teacher(student: FlowModel) -> EMATeacher:
    """The student's average."""
    return EMATeacher(student, 0.99)


def random_condition(student: FlowModel, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """A condition of some rows, bf16."""
    return {
        key: torch.empty(rows, *[tokens] * (key == "prompt_embeds"), width, device=META, dtype=torch.bfloat16)
        for key, width in student.condition_widths().items()
    }
