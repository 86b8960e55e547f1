"""`ema_weights()`, `frozen_weights()`: where a teacher's own weights are.

They are in a copy of the student's module, in a slot beside the adapter that it trains, or in shards beside its own.
"""

from typing import TYPE_CHECKING, TypeAlias, Union

from torch import nn

from twinflow.distributed import unwrap
from twinflow.interface import Student
from twinflow.teachers.module_copy import ModuleCopy
from twinflow.teachers.sharded_weights import ShardedWeights, is_sharded

if TYPE_CHECKING:
    from twinflow.teachers.adapter_slot import AdapterSlot

DEFAULT_SLOT = "ema"
TeacherWeights: TypeAlias = Union[ModuleCopy, "AdapterSlot", ShardedWeights]


def ema_weights(student: nn.Module, adapter: str | None) -> tuple[TeacherWeights, str | None]:
    """The weights of an average, and the name of the adapter that they are; None: no adapter.

    Raises:
        ValueError: an adapter name that is taken or has no use.
    """
    adapted, sharded = trains_adapter(student), is_sharded(student)
    if adapter is not None and (sharded or not adapted):
        lack = "is sharded" if sharded else "trains no adapter"
        raise ValueError(f"EMATeacher: adapter must be None where the student {lack}, got {adapter!r}")
    if not adapted or sharded:
        return ShardedWeights(student) if sharded else ModuleCopy(student), None
    from twinflow.teachers.adapter_slot import AdapterSlot

    return AdapterSlot(student, adapter or DEFAULT_SLOT), adapter or DEFAULT_SLOT


def frozen_weights(student: nn.Module) -> TeacherWeights:
    """The student's weights as they are now; of a student that trains an adapter those without it."""
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


def require_trainable(where: str, student: Student) -> None:
    """Raises TypeError or ValueError unless a student is a module with a parameter that requires grad."""
    module = unwrap(student)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{where}: student must be an nn.Module, got {type(student).__name__}")
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"{where}: student must have a parameter that requires grad, got none")
