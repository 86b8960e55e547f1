"""`apply_memory()`: puts a memory preset on a loaded model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from twinflow.interface import unwrap
from twinflow.memory.offload import offload_activations
from twinflow.memory.presets import MemoryPreset, preset_of
from twinflow.memory.recompute import selective_recompute

SPARE_BYTES = 300_000_000  # of a card, for the allocator's fragments


class AppliedMemory:
    """A preset at work on a model, until `remove`; a context manager too.

    Attributes:
        preset: what was applied.
        micro_batch: for `TwinFlowLoss.backward`; None: the whole batch at once.
    """

    def __init__(self, preset: MemoryPreset, removals: list[Callable[[], None]]) -> None:
        self.preset, self._removals = preset, removals
        self.micro_batch = preset.micro_batch

    def remove(self) -> None:
        """Takes everything off the model again."""
        while self._removals:
            self._removals.pop()()

    def __enter__(self) -> "AppliedMemory":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def apply_memory(
    student: nn.Module,
    preset: str | MemoryPreset = "auto",
    *,
    memory_gb: float | None = None,
    pin_memory: bool = True,
    **workload: Any,
) -> AppliedMemory:
    """Puts a preset's mechanisms on a model, and prints what was chosen.

    Args:
        student: a model from `twinflow.models.load`, in DDP's wrapper or not; any module for a preset by name.
        preset: one of `twinflow.memory.PRESETS` or a `MemoryPreset`; `auto`: the fastest that fits, by the planner.
        memory_gb: what `auto` may use, GB (1e9 bytes); None: what the student's CUDA device has.
        pin_memory: whether offloaded activations go to pinned memory; False: pageable, whose copies are synchronous.
        workload: for `auto`, settings of `twinflow.memory.planner.Workload`: `resolution`, `batch`, `text_tokens`, ...

    Returns:
        What was applied.

    Raises:
        TypeError: student is no module, or preset neither a name nor a MemoryPreset.
        ValueError: an unknown preset, no preset fits, gradient checkpointing is on already, or the host has too little
            memory for what is to be offloaded.
    """
    module = unwrap(student)
    if not isinstance(module, nn.Module):
        raise TypeError(f"apply_memory: student must be an nn.Module, got {type(module).__name__}")
    if not isinstance(preset, (str, MemoryPreset)):
        raise TypeError(f"apply_memory: preset must be a name or a MemoryPreset, got {type(preset).__name__}")
    if preset == "auto":
        preset = _chosen(module, memory_gb, workload)
    elif workload or memory_gb is not None:
        given = ", ".join([*workload, *(["memory_gb"] if memory_gb is not None else [])])
        raise ValueError(f"apply_memory: {given} must be left out where preset is not 'auto', got preset {preset!r}")
    chosen = preset_of(preset) if isinstance(preset, str) else preset
    removals: list[Callable[[], None]] = []
    try:
        if chosen.saved != "all":
            removals.append(selective_recompute(module, chosen.saved).remove)
        if chosen.offload_gb:
            offload = offload_activations(budget_gb=chosen.offload_gb, pin_memory=pin_memory)
            removals.append(offload.attach(module).remove)
    except BaseException:
        for remove in reversed(removals):
            remove()
        raise
    print(chosen)
    return AppliedMemory(chosen, removals)


def _chosen(student: nn.Module, memory_gb: float | None, workload: dict[str, Any]) -> MemoryPreset:
    from twinflow.memory.planner.choice import choose
    from twinflow.memory.planner.forecasting import Planner
    from twinflow.memory.planner.own import own_workload

    if memory_gb is None:
        device = next(student.parameters()).device
        if device.type != "cuda":
            raise ValueError(f"apply_memory: memory_gb must be given where the student is on {device}, got None")
        free, _ = torch.cuda.mem_get_info(device)
        memory_gb = (free + torch.cuda.memory_reserved(device) - SPARE_BYTES) / 1e9
    return choose(Planner(own_workload(student, **workload)), memory_gb).preset  # type: ignore[arg-type]
