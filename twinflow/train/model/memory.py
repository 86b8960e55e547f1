"""`put_memory()`: the memory preset of a run on its student; what was forecast, for whoever runs out of memory."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from twinflow.memory import PRESETS, AppliedMemory, MemoryPreset, apply_memory
from twinflow.memory.apply import SPARE_BYTES
from twinflow.memory.presets import preset_of
from twinflow.models import FlowModel
from twinflow.train.config.settings import TrainSettings
from twinflow.train.model.parallel import check_sharded

if TYPE_CHECKING:
    from twinflow.memory.planner.forecast import Forecast
    from twinflow.memory.planner.workload import Workload

logger = logging.getLogger(__name__)

_TENSORS_OF_A_ROW = 12  # latents, noises and targets that a step holds of each row
_OPTIMIZERS = {"radam": "adamw"}  # of the same size
UNKNOWN = "rows"  # where no forecast can be made
SHARDED = "checkpoint"


def put_memory(
    settings: TrainSettings,
    student: FlowModel,
    device: torch.device,
    text_tokens: int | None = None,
    sharded: bool = False,
) -> AppliedMemory:
    """Applies the run's preset and moves the student to the device; `auto` is the fastest that fits a CUDA device.

    Args:
        student: on the CPU, with its LoRA.
        text_tokens: length of the longest prompt; None: as usual for the model.
        sharded: the weights are going to be, block by block: the student stays on the CPU, and `auto`, which knows
            nothing of shards, recomputes the blocks.

    Raises:
        ValueError: nothing fits, or the preset does not apply to this model.
    """
    name = settings.memory_preset
    if sharded:
        preset = preset_of(SHARDED if name == "auto" else name)
        check_sharded(settings, student, preset)
        return apply_memory(student, preset)
    if name != "auto":
        return apply_memory(student, name, device=device)
    if device.type != "cuda":
        return apply_memory(student, "batch", device=device)
    try:
        workload = workload_of_run(settings, student, text_tokens)
    except ValueError as error:
        logger.info("memory preset %s, as no forecast can be made (%s)", UNKNOWN, error)
        return apply_memory(student, UNKNOWN, device=device)
    free, _ = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device) - SPARE_BYTES - held_bytes(settings, workload)
    from twinflow.memory.planner.choose import choose
    from twinflow.memory.planner.forecast import Planner

    return apply_memory(student, choose(Planner(workload), usable / 1e9).preset, device=device)


def workload_of_run(settings: TrainSettings, student: FlowModel, text_tokens: int | None = None) -> "Workload":
    """What the planner is asked for a run's student: the rows of a micro-batch on one card.

    Args:
        student: on any device, the meta device among them.
        text_tokens: length of the longest prompt; None: as usual for the model.

    Raises:
        ValueError: a family that the planner does not know.
    """
    from twinflow.memory.planner.from_student import workload_from_student

    objective = settings.objective
    return workload_from_student(
        student, resolution=settings.resolution, batch=settings.train_batch_size, recipe=objective.recipe,
        order=objective.estimate_order, text_tokens=text_tokens,
        optimizer=_OPTIMIZERS.get(settings.optimizer, settings.optimizer),
    )  # fmt: skip


def workload_of_published(settings: TrainSettings) -> "Workload | None":
    """The workload of a run whose model is not here, by what the planner knows of its hub repository; None: nothing."""
    from twinflow.memory.planner.architectures import architecture_on_the_hub
    from twinflow.memory.planner.workload import Workload

    architecture = architecture_on_the_hub(settings.pretrained_model_name_or_path)
    if architecture is None:
        return None
    objective, lora = settings.objective, settings.model_type == "lora"
    more: dict[str, Any] = {} if settings.conditioning is None else {"conditioning": settings.conditioning}
    return Workload(
        architecture=architecture, resolution=settings.resolution, batch=settings.train_batch_size,
        lora_rank=settings.lora_rank if lora else None, lora_targets=settings.lora_layers or None,
        recipe=objective.recipe, order=objective.estimate_order, **more,
        base="bfloat16" if lora and settings.mixed_precision == "bf16" else "float32",
        optimizer=_OPTIMIZERS.get(settings.optimizer, settings.optimizer),
    )  # fmt: skip


def held_bytes(settings: TrainSettings, workload: "Workload") -> int:
    """Latents, noises and targets of the rows that wait in a step while others are computed."""
    channels, height, width = workload.latent
    return (settings.step_rows - settings.train_batch_size) * channels * height * width * 4 * _TENSORS_OF_A_ROW


def smaller_preset(forecasts: "list[Forecast]", preset: MemoryPreset, peak_bytes: int) -> MemoryPreset | None:
    """The fastest preset that is forecast to need less than a peak was; None: there is none.

    Args:
        forecasts: of all presets, the fastest first.
        preset: that ran out of memory.
        peak_bytes: what it had taken by then, or was forecast to.
    """
    mine = next((f.peak for f in forecasts if f.preset.name == preset.name), peak_bytes)
    return next((f.preset for f in forecasts if f.peak < 0.97 * min(mine, peak_bytes)), None)


def after_out_of_memory(
    settings: TrainSettings, student: FlowModel, memory: AppliedMemory, device: torch.device
) -> str:
    """What to say when CUDA had no memory left: forecast, actual, and the next smaller preset."""
    peak, name = torch.cuda.max_memory_allocated(device), memory.preset.name
    _, total = torch.cuda.mem_get_info(device)
    said = f"memory preset {name} took {peak / 1e9:.1f} GB of {total / 1e9:.1f} GB"
    try:
        from twinflow.memory.planner.forecast import Planner

        planner = Planner(workload_of_run(settings, student))
        # The run keeps its optimizer, whichever preset it goes on with.
        presets = [replace(preset, optimizer=memory.preset.optimizer) for preset in planner.presets.values()]
        found = [planner.forecast(preset) for preset in presets]
        mine = planner.forecast(memory.preset)
    except ValueError:
        order = list(PRESETS)
        place = order.index(name) + 1 if name in order else len(order)
        later = order[place] if place < len(order) else None
        return f"{said}; " + (f"try --memory_preset {later}" if later else "no preset needs less")
    smaller = smaller_preset(found, memory.preset, max(peak, mine.peak))
    said += f", forecast {mine.peak / 1e9:.1f} GB"
    if smaller is None:
        return f"{said}; no preset needs less: lower train_batch_size, resolution or lora_rank"
    least = next(f.peak for f in found if f.preset == smaller)
    return f"{said}; try --memory_preset {smaller.name} (forecast {least / 1e9:.1f} GB)"
