"""`static_memory()`: what a training run holds at all times: weights, adapters, optimizer, average."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from twinflow.memory.planner.simulation.shortened_model import ShortenedModel
from twinflow.memory.planner.simulation.storage_tracker import aligned
from twinflow.teachers.teachers import EMATeacher

# Bytes that an update reads and writes per parameter, float32: itself, its gradient, the optimizer's states.
TRAFFIC = {"adamw": 16 + 12, "adamw8bit": 10 + 6, "sgd": 8 + 4}
BLOCKWISE = 256  # values per scale of bitsandbytes' 8-bit states; tensors under 4096 values keep float32 ones
_SMALL = 4096


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that live from the first step to the last.

    Args:
        weights: the network: frozen base, or all that is trained where that is all.
        adapters: LoRA and conditioning beside a frozen base.
        optimizer: its states.
        ema: the average, and the copy that computes where it is another.
        trained: number of trained parameters.
    """

    weights: int
    adapters: int
    optimizer: int
    ema: int
    trained: int


def static_memory(
    student: nn.Module,
    teacher: EMATeacher | None,
    optimizer: str,
    reduction: ShortenedModel,
    elsewhere: Collection[nn.Module] = (),
) -> StaticMemory:
    """Counts a small model's tensors as often as they are there in the whole one.

    Args:
        student, teacher: on any device; teacher None: no average is kept.
        elsewhere: layers whose parameters are not on the device.
    """
    full = all(p.requires_grad for p in student.parameters())
    mine = {} if teacher is None else _averages(teacher)
    held = {id(tensor) for tensor, _ in mine.values()} | {id(p) for layer in elsewhere for p in layer.parameters()}
    weights = adapters = states = trained = 0
    for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
        if id(tensor) in held:
            continue
        times = reduction.times(name)
        size = aligned(tensor.untyped_storage().nbytes()) * times
        if not tensor.requires_grad or full:
            weights += size
        else:
            adapters += size
        if tensor.requires_grad:
            trained += tensor.numel() * times
            states += _states(tensor, optimizer) * times
    ema = sum(size * reduction.times(name.partition(" ")[0]) for name, (_, size) in mine.items())
    return StaticMemory(weights, adapters, states, ema, trained)


def _averages(teacher: EMATeacher) -> dict[str, tuple[torch.Tensor, int]]:
    """Name -> tensor and bytes: the average, and `<name> copy` where another tensor computes."""
    found = {name: (value, aligned(value.untyped_storage().nbytes())) for name, value in teacher.parameters().items()}
    for name, value in teacher._weights.targets.items():
        average = teacher.parameters()[name]
        if value.untyped_storage()._cdata == average.untyped_storage()._cdata:
            found[name] = (value, found[name][1])
        else:
            found[f"{name} copy"] = (value, aligned(value.untyped_storage().nbytes()))
    return found


def _states(parameter: torch.Tensor, optimizer: str) -> int:
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return 2 * aligned(parameter.numel() * parameter.element_size())
    count = parameter.numel()
    return 2 * aligned(4 * count if count < _SMALL else count + 4 * -(-count // BLOCKWISE))
