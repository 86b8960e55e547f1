"""`workload_from_student()`: the workload of a student that is loaded already."""

import inspect
from typing import Any

import diffusers
import torch

from twinflow.conditioning import LORA_MODE
from twinflow.errors import ArgumentError
from twinflow.memory.blocks import repeated_blocks
from twinflow.memory.modulation.layers import deferrable_layers
from twinflow.memory.planner.architectures import Architecture
from twinflow.memory.planner.workload import Workload
from twinflow.memory.quantised_base import quantised_form
from twinflow.models import FlowModel
from twinflow.models.registry import diffusers_families
from twinflow.teachers.adapter_slot import adapter_layers, trained_adapter
from twinflow.teachers.weights import trains_adapter


def workload_from_student(student: FlowModel, **settings: Any) -> Workload:
    """What training a student takes: its configuration, its LoRA, its conditioning.

    Args:
        student: from `twinflow.models.load`, with its LoRA where it has one.
        settings: of `Workload`, such as `resolution`, `batch`, `text_tokens`, `recipe`.

    Raises:
        ValueError: a family that the planner does not know, or as `Workload`.
    """
    if not isinstance(student, FlowModel) or not student.block_lists:
        got = getattr(student, "transformer_class", type(student).__name__)
        planned = ", ".join(name for name, family in diffusers_families().items() if family.block_lists)
        raise ArgumentError("plan", "student", f"a model of {planned}", got, "choose a preset by name")
    network = student.network
    known = inspect.signature(getattr(diffusers, student.transformer_class).__init__).parameters
    architecture = Architecture(
        name=student.family,
        transformer=student.transformer_class,
        config={name: value for name, value in dict(student.config).items() if name in known},
        latent_channels=student.latent_channels(),
        latent_factor=student.latent_factor,
        text_tokens=256,
    )
    settings.setdefault("conditioning", LORA_MODE if student.conditioning is None else student.conditioning.mode)
    rank, targets = _lora(student) if trains_adapter(student) else (None, None)
    floating = next(p.dtype for p in network.parameters() if p.is_floating_point())
    base = quantised_form(student) or ("float32" if floating is torch.float32 else "bfloat16")
    settings.setdefault("base", base)
    settings.setdefault("deferrable", _deferrable(student))
    return Workload(architecture=architecture, lora_rank=rank, lora_targets=targets, **settings)


def _deferrable(student: FlowModel) -> bool:
    try:
        return bool(deferrable_layers(student))
    except ValueError:
        return False


def _lora(student: FlowModel) -> tuple[int, tuple[str, ...]]:
    """Rank, and the layers' names within their blocks."""
    layers = adapter_layers(student.network)
    name = trained_adapter(layers, "plan")
    blocks = tuple(f"{block}." for block in repeated_blocks(student.network))
    names = set()
    for path, layer in layers.items():
        if name in layer._all_available_adapter_names():
            block = next((b for b in blocks if path.startswith(b)), "")
            names.add(path.removeprefix(block))
    ranks = [layer.r[name] for layer in layers.values() if name in layer.r]  # type: ignore[attr-defined]
    return max(ranks), tuple(sorted(names))
