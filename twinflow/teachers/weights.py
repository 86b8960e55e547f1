"""Where a teacher's own weights live: `ModuleCopy` here, an adapter's second slot, or shards beside the student's."""

import copy
from typing import Any

import torch
from torch import nn

from twinflow.distributed import unwrap
from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.interface import Student, TeacherWeights, move_like, plain_name, plain_names, trained_parameters
from twinflow.teachers.sharded_weights import ShardedWeights, is_sharded

DEFAULT_SLOT = "ema"


class ModuleCopy(TeacherWeights):
    """A teacher's weights as a module: a copy of the student that shares its frozen tensors.

    Args:
        student: the module, wrapped for DDP or compilation or not.

    Attributes:
        module: the network that computes with the copies.
    """

    def __init__(self, student: nn.Module) -> None:
        self._student = student
        original = unwrap(student)
        assert isinstance(original, nn.Module)
        self.sources = trained_parameters(original)
        frozen = {id(p): p for p in original.parameters() if not p.requires_grad}
        self.module: nn.Module = copy.deepcopy(original, memo=frozen)
        for parameter in self.module.parameters():
            if id(parameter) not in frozen:
                parameter.requires_grad_(False)
        copied = plain_names(dict(self.module.named_parameters()))
        self.targets: dict[str, torch.Tensor] = {n: copied[n] for n in self.sources}
        compiled = getattr(student, "_orig_mod", None) is not None
        self._call: Student = torch.compile(self.module) if compiled else self.module

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any) -> torch.Tensor:
        """The copy's velocity, with dropout active where it is in the student."""
        original = unwrap(self._student)
        if self.module.training != original.training:
            self.module.train(original.training)
        return self._call(x_t, t, r, cond)

    def follow(self) -> None:
        super().follow()
        originals = dict(unwrap(self._student).named_buffers())
        for name, buffer in self.module.named_buffers():
            move_like(buffer, originals[name])

    def copy_buffers(self) -> None:
        copies = list(self.module.named_buffers())
        originals = dict(unwrap(self._student).named_buffers()) if copies else {}
        for name, buffer in copies:
            buffer.copy_(originals[name])

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        saved = self.module.state_dict(keep_vars=True)
        return {plain_name(name): b for name, b in self.module.named_buffers() if name in saved}


def ema_weights(student: nn.Module, adapter: str | None) -> tuple[TeacherWeights, str | None]:
    """Makes an average's weights; also returns the name of its adapter, None where it is no adapter.

    Raises:
        ArgumentError: an adapter name that is taken or has no use.
    """
    adapted, sharded = trains_adapter(student), is_sharded(student)
    if adapter is not None and (sharded or not adapted):
        lack = "is sharded" if sharded else "trains no adapter"
        raise ArgumentError("EMATeacher", "adapter", f"None where the student {lack}", repr(adapter))
    if not adapted or sharded:
        return ShardedWeights(student) if sharded else ModuleCopy(student), None
    from twinflow.teachers.adapter_slot import AdapterSlot

    return AdapterSlot(student, adapter or DEFAULT_SLOT), adapter or DEFAULT_SLOT


def frozen_weights(student: nn.Module) -> TeacherWeights:
    """Copies the student's weights as they are now; of a student that trains an adapter those without it."""
    if not trains_adapter(student):
        return ShardedWeights(student) if is_sharded(student) else ModuleCopy(student)
    from twinflow.teachers.adapter_slot import AdapterSlot

    return AdapterSlot(student, None)


def trains_adapter(student: Student) -> bool:
    """Whether a student has a peft adapter that requires grad."""
    module = unwrap(student)
    if not isinstance(module, nn.Module) or not any(hasattr(m, "active_adapters") for m in module.modules()):
        return False  # peft is not imported where it is not in use
    from twinflow.teachers.adapter_slot import adapter_layers, adapter_parameters

    return any(
        p.requires_grad
        for layer in adapter_layers(module).values()
        for adapter in layer.active_adapters
        for p in adapter_parameters(layer, adapter).values()
    )


def require_trainable(function: str, student: Student) -> None:
    """Raises ArgumentTypeError or ArgumentError unless a student is a module with a parameter that requires grad."""
    module = unwrap(student)
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(function, "student", "an nn.Module", type(student).__name__)
    if not any(p.requires_grad for p in module.parameters()):
        raise ArgumentError(function, "student", "a parameter that requires grad", "none", verb="have")
