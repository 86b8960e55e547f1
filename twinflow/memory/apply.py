"""`apply_memory()`: puts a memory preset on a loaded model.

The planner is imported only where `auto` needs it: it loads diffusers' model classes and the kernels' shapes.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from twinflow.distributed import unwrap
from twinflow.errors import ArgumentError, ArgumentTypeError, require_type
from twinflow.memory.adamw_8bit import adamw_8bit
from twinflow.memory.blocks import Attached
from twinflow.memory.modulation.defer import defer_modulation
from twinflow.memory.modulation.layers import deferrable_layers
from twinflow.memory.offload.activations import offload_activations
from twinflow.memory.presets import MemoryPreset, preset_of
from twinflow.memory.quantised_base import quantise_base, quantised_form
from twinflow.memory.recompute import selective_recompute
from twinflow.models import FlowModel

logger = logging.getLogger(__name__)

SPARE_BYTES = 300_000_000  # of a card, for the allocator's fragments


class AppliedMemory(Attached):
    """A preset at work on a model, until `remove()`; a quantised base stays, which has lost its bits.

    Attributes:
        preset: what was applied.
        micro_batch: for `TwinFlowLoss.backward`; None: the whole batch at once.
    """

    def __init__(self, preset: MemoryPreset, removals: list[Callable[[], None]]) -> None:
        super().__init__(removals)
        self.preset = preset
        self.micro_batch = preset.micro_batch

    def adamw(self, parameters: Iterable[Any], **settings: Any) -> torch.optim.Optimizer:
        """AdamW as the preset counts on: `adamw_8bit`, or torch's own, fused.

        Args:
            parameters: what is trained, or dicts of groups.
            settings: `lr`, `betas`, `eps`, `weight_decay`.
        """
        if self.preset.optimizer == "adamw8bit":
            return adamw_8bit(parameters, **settings)
        return torch.optim.AdamW(parameters, fused=True, **settings)


def apply_memory(
    student: nn.Module,
    preset: str | MemoryPreset = "auto",
    *,
    memory_gb: float | None = None,
    device: torch.device | str | None = None,
    pin_memory: bool = True,
    **workload: Any,
) -> AppliedMemory:
    """Puts a preset's mechanisms on a model, and logs what it chose and did (INFO).

    Args:
        student: a model from `twinflow.models.load`, in DDP's wrapper or not; any module for a preset by name that
            changes activations only.
        preset: one of `twinflow.memory.PRESETS` or a `MemoryPreset`; `auto`: the fastest that fits, by the planner.
        memory_gb: what `auto` may use, GB (1e9 bytes); None: what the CUDA device has.
        device: where the model computes; it is moved there as the preset wants it, so that what stays in host memory
            or is packed first never needs its full size there. None: where it is.
        pin_memory: whether what moves to the host goes to pinned memory; False: pageable, whose copies are synchronous.
        workload: for `auto`, settings of `twinflow.memory.planner.workload.Workload`: `resolution`, `batch`,
            `text_tokens`, ...

    Returns:
        The mechanisms at work; `print(applied.preset)` describes them.

    Raises:
        TypeError: student is no module, or preset neither a name nor a MemoryPreset.
        ValueError: an unknown preset, no preset fits, gradient checkpointing is on already, a model without modulation
            layers or with trained ones where the preset defers them, a base that is quantised in another form, or a
            host with too little memory.
        ImportError: the preset's base needs a library that is missing.
    """
    module = unwrap(student)
    require_type(isinstance(module, nn.Module), "apply_memory", "student", "an nn.Module", type(module).__name__)
    named = isinstance(preset, (str, MemoryPreset))
    require_type(named, "apply_memory", "preset", "a name or a MemoryPreset", type(preset).__name__)
    target = None if device is None else torch.device(device)
    if preset == "auto":
        preset = _choose(module, memory_gb, target, workload)
    elif workload or memory_gb is not None:
        auto_only = ", ".join([*workload, *(["memory_gb"] if memory_gb is not None else [])])
        raise ArgumentError("apply_memory", auto_only, "left out where preset is not 'auto'", f"preset {preset!r}")
    chosen = preset_of(preset) if isinstance(preset, str) else preset
    if (chosen.defer or chosen.base) and not isinstance(module, FlowModel):
        wanted = f"from twinflow.models.load for preset {chosen.name!r}"
        raise ArgumentTypeError("apply_memory", "student", wanted, type(module).__name__)
    removals: list[Callable[[], None]] = []
    try:
        _keep_fewer_activations(module, chosen, pin_memory, removals)
        _place_weights(module, chosen, target, pin_memory, removals)
    except BaseException:
        for remove in reversed(removals):
            remove()
        raise
    logger.info("%s", chosen)
    return AppliedMemory(chosen, removals)


def _keep_fewer_activations(
    module: nn.Module, chosen: MemoryPreset, pin_memory: bool, removals: list[Callable]
) -> None:
    if chosen.saved != "all":
        removals.append(selective_recompute(module, chosen.saved).remove)
    if chosen.offload_gb:
        offload = offload_activations(budget_gb=chosen.offload_gb, pin_memory=pin_memory)
        removals.append(offload.attach(module).remove)


def _place_weights(
    module: nn.Module, chosen: MemoryPreset, device: torch.device | None, pin_memory: bool, removals: list[Callable]
) -> None:
    """Packs, defers and moves. Packing cannot be undone, so the layers to defer are checked first."""
    skipped = list(deferrable_layers(module)) if chosen.defer else []  # type: ignore[arg-type]
    form = quantised_form(module)
    if chosen.base and form not in (None, chosen.base):
        raise ArgumentError("apply_memory", "base", f"{chosen.base} for preset {chosen.name!r}", f"one in {form}")
    if chosen.base and form is None:
        quantised = quantise_base(module.network, chosen.base, device=device, skip=skipped)  # type: ignore[arg-type]
        logger.info("%s", quantised)
    elif form is not None:
        logger.info("the base is in %s already", form)
    if chosen.defer:
        deferred = defer_modulation(module, device=device, pin_memory=pin_memory)
        removals.append(deferred.remove)
        logger.info("%s", deferred)
    elif device is not None:
        module.to(device)


def _choose(
    student: nn.Module, memory_gb: float | None, device: torch.device | None, workload: dict[str, Any]
) -> MemoryPreset:
    from twinflow.memory.planner.choose import choose
    from twinflow.memory.planner.forecast import Planner
    from twinflow.memory.planner.from_student import workload_from_student

    if memory_gb is None:
        device = next(student.parameters()).device if device is None else device
        if device.type != "cuda":
            raise ArgumentError("apply_memory", "memory_gb", f"given where the student is on {device}", None)
        free, _ = torch.cuda.mem_get_info(device)
        memory_gb = (free + torch.cuda.memory_reserved(device) - SPARE_BYTES) / 1e9
    return choose(Planner(workload_from_student(student, **workload)), memory_gb).preset  # type: ignore[arg-type]
