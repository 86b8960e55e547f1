"""`assemble()`: the loop of a run, from its settings and its data."""

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twinflow.distributed import unwrap, world
from twinflow.interface import Teacher, trained_parameters
from twinflow.memory import AppliedMemory
from twinflow.memory.blocks import repeated_blocks
from twinflow.models import FlowModel
from twinflow.objective.loss import TwinFlowLoss
from twinflow.train.checkpoint.run_state import RunState
from twinflow.train.config.settings import TrainSettings
from twinflow.train.data.batches import Batches
from twinflow.train.data.cache import Cache, Entry, longest_prompt
from twinflow.train.loop import Loop
from twinflow.train.model.memory import put_memory
from twinflow.train.model.optimizer import build_optimizer, warm_up
from twinflow.train.model.parallel import launcher_kind, wrap
from twinflow.train.model.student import build_student

_VARIANTS = 64  # of a compiled block; torch's own limit is 8
_RANK_SEEDS = 1 << 20  # between the seeds of two ranks' noises


@dataclass(frozen=True)
class Assembled:
    """A run's parts.

    Args:
        model: the student itself, inside what `loop.student` wraps.
        memory: what was applied.
        trained, parameters: how many parameters are trained, and there are, the teacher's not counted.
    """

    loop: Loop
    model: FlowModel
    teacher: Teacher | None
    memory: AppliedMemory
    trained: int
    parameters: int


def assemble(
    settings: TrainSettings,
    folder: Path,
    cache: Cache,
    entries: list[Entry],
    accelerator: Any,
    saved_optimizer: str | None = None,
) -> Assembled:
    """Loads the model, puts the memory preset and the launcher's wrapper on it, and makes what moves it.

    Args:
        entries: of the cache, to train on.
        accelerator: accelerate's, for the device and the kind of parallelism.
        saved_optimizer: kind of the optimizer in the checkpoint that the run goes on from.

    Raises:
        ValueError, ImportError: a model, a preset or a library that does not go with the settings.
    """
    device = accelerator.device
    random.seed(settings.seed)  # torch's stream is seeded by `build_student`
    np.random.seed(settings.seed)
    model = build_student(settings, folder)
    counts = [sum(p.numel() for p in of) for of in (trained_parameters(model).values(), model.parameters())]
    planned = settings.memory_preset == "auto" and device.type == "cuda"
    tokens = longest_prompt(cache) if planned else None
    memory = put_memory(settings, model, device, tokens, sharded=launcher_kind(accelerator) == "fsdp2")
    if settings.compile_blocks:
        _compile(model)
    student, teacher = wrap(settings, model, accelerator, memory.preset)
    trained = trained_parameters(unwrap(student))
    optimizer = build_optimizer(settings, trained.values(), memory, saved_optimizer)
    scheduler = warm_up(optimizer, settings.lr_warmup_steps)
    criterion = TwinFlowLoss(settings.objective)
    rank, ranks = world()
    generator = torch.Generator(device).manual_seed(settings.seed + rank * _RANK_SEEDS)
    batches = Batches(entries, batch=settings.train_batch_size, seed=settings.seed, rank=rank, world=ranks)
    state = RunState(
        student, teacher, criterion, optimizer, scheduler, {"steps": generator}, batches, {"step": 0, "seconds": 0.0}
    )
    micro_batch = min(settings.train_batch_size, memory.micro_batch or settings.train_batch_size)
    loop = Loop(
        settings, student, teacher, criterion, cache, batches, state, generator, micro_batch,
        autocast=lambda: autocast(settings, device), device=device,
    )  # fmt: skip
    return Assembled(loop, model, teacher, memory, *counts)


def _compile(model: FlowModel) -> None:
    """Compiles each repeated block: with and without gradient, by student's and teacher's adapter, for every size."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    for block in repeated_blocks(model.network).values():
        block.compile()


def autocast(settings: TrainSettings, device: torch.device) -> AbstractContextManager:
    """Where whole weights, which are float32, compute in bfloat16; a LoRA's base is in it already."""
    if settings.model_type == "full" and settings.mixed_precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def headline(settings: TrainSettings, parts: Assembled, entries: int) -> str:
    """Model, what of it is trained, on what, how, and where.

    Args:
        entries: images or prompts that it is trained on.
    """
    kind = f"LoRA of rank {settings.lora_rank}" if settings.model_type == "lora" else "all weights"
    counts = f"{amount(parts.trained)} of {amount(parts.parameters)} parameters"
    how = "flow matching" if settings.twinflow is None else f"TwinFlow ({settings.twinflow.recipe})"
    data = f"{entries} {'prompts' if settings.data_free else 'images'}"
    _, ranks = world()
    rows = f"{settings.step_rows * ranks} rows a step" + (f" on {ranks} processes" if ranks > 1 else "")
    device = parts.loop.device
    where = device.type if device.type == "cpu" else device
    return f"{parts.model.family}: {kind} ({counts}), {how}, {data}, {rows}, {where}"


def amount(number: int) -> str:
    """A number of parameters with three digits, as 20.4 B."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)
