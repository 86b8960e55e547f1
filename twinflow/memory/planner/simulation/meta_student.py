"""`meta_student()`: a student and its teacher on the meta device, as a training run would make them."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from twinflow.lora import add_lora
from twinflow.memory.blocks import repeated_blocks
from twinflow.memory.planner.architectures import Architecture
from twinflow.memory.planner.workload import Workload
from twinflow.memory.quantised_linear import ALIGNED, LIBRARIES, PackedProduct, PackedWeight, Packing, part_sizes
from twinflow.models import FlowModel, load
from twinflow.teachers.teachers import EMATeacher

META = torch.device("meta")


class _Packed(PackedWeight):
    """A packed weight whose products ask for no autocast, of which the meta device has none."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.linear:
            x, weight, bias = args
            return PackedProduct.apply(x, weight, bias, weight.packing)
        return super().__torch_function__(function, types, args, kwargs)


def meta_student(workload: Workload, architecture: Architecture, defer: bool = False) -> FlowModel:
    """A student of an architecture, made and conditioned as training would.

    Args:
        architecture: the workload's own, or a reduction of it.
        defer: its modulation is to be deferred, whose layers are then not quantised.
    """
    return as_trained(meta_network(architecture, workload.base), workload, workload.conditioning, defer)


def meta_network(architecture: Architecture, base: str) -> FlowModel:
    """A model of an architecture as it is loaded, without conditioning or adapters.

    Args:
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


def as_trained(network: FlowModel, workload: Workload, conditioning: str | None, defer: bool = False) -> FlowModel:
    """Gives a model the conditioning and the LoRA of a workload.

    Args:
        conditioning: its mode; None: it stays plain.
    """
    if workload.lora_rank is not None:
        add_lora(network, workload.lora_rank, targets=workload.lora_targets, conditioning=conditioning)
    elif conditioning is not None:
        network.condition(conditioning)
    quantise(network, workload.base, network.modulation_layers().values() if defer else ())
    return network


def quantise(network: FlowModel, base: str, but: Collection[nn.Module] = ()) -> None:
    """Packs what `quantise_base` would, but some layers, where the base is quantised; there are no values to pack."""
    if base not in LIBRARIES:
        return
    for block in repeated_blocks(network.network).values():
        for layer in block.modules():
            if type(layer) is nn.Linear and not layer.weight.requires_grad and layer not in but:
                packing = Packing(base, layer.out_features, layer.in_features, layer.weight.dtype)
                count = sum(
                    -(-size // ALIGNED) * ALIGNED for size in part_sizes(base, layer.weight.numel(), packing.rows)
                )
                layer.weight.data = torch.empty(count, dtype=torch.uint8, device=META)
                layer.weight.__class__ = _Packed
                layer.weight.packing = packing  # type: ignore[attr-defined]


def meta_teacher(student: FlowModel) -> EMATeacher:
    """The student's average."""
    return EMATeacher(student, 0.99)


def random_condition(student: FlowModel, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """A condition of some rows, bf16."""
    return {
        key: torch.empty(rows, *[tokens] * (key == "prompt_embeds"), width, device=META, dtype=torch.bfloat16)
        for key, width in student.condition_widths().items()
    }
