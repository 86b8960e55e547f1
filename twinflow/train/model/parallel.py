"""`wrap()`: a run's student and teacher under what the launcher asked for; `clip()`: their gradients' norm."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from twinflow.errors import require
from twinflow.interface import Teacher
from twinflow.memory import MemoryPreset
from twinflow.memory.blocks import repeated_blocks
from twinflow.memory.quantised_base import quantised_form
from twinflow.models import FlowModel
from twinflow.train.config.settings import TrainSettings
from twinflow.train.model.student import build_teacher

_LAUNCHER = ("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "DYNAMO_BACKEND")  # it sets ACCELERATE_...


def wrap(
    settings: TrainSettings, model: FlowModel, accelerator: Any, preset: MemoryPreset | None = None
) -> tuple[nn.Module, Teacher | None]:
    """Puts a student under what the launcher asked for, and makes its teacher.

    One process: the student as it is. Several: DDP, or FSDP2 where `accelerate launch --use_fsdp --fsdp_version 2`
    asks for it (under torchrun: ACCELERATE_USE_FSDP=true and FSDP_VERSION=2), a unit per repeated block.

    Sharding replaces parameters, and each step takes what the one before it made: `build_student`, the memory preset,
    compilation of blocks, `wrap`, the optimizer of `trained_parameters(unwrap(student))`, `RunState`. For FSDP2 leave
    the model on the CPU: its blocks go to the device one by one, each rank keeping its shards.

    Args:
        model: of `build_student`, with its memory preset; the same on every rank.
        accelerator: accelerate's, for the device and the kind of parallelism.
        preset: what was applied to the model; None: nothing that the model does not show.

    Returns:
        What to call, on `accelerator.device`, and its teacher; None: plain flow matching without an average.

    Raises:
        ValueError: a launcher that is not supported, or what FSDP2 cannot shard: see `check_sharded`.
    """
    kind = launcher_kind(accelerator)
    if kind != "fsdp2":
        model.to(accelerator.device)
    student: nn.Module = model
    if kind == "fsdp2":
        check_sharded(settings, model, preset)
        _shard(model, accelerator)
    elif kind == "ddp":
        # Adapters of an output that is thrown away, as a last block's on its text, get no gradient.
        devices = None if accelerator.device.type == "cpu" else [accelerator.device]
        student = DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)
    return student, build_teacher(settings, student)


def launcher_kind(accelerator: Any) -> str:
    """What the launcher asked for: `one` process, `ddp` or `fsdp2`.

    Raises:
        ValueError: something else.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    found = accelerator.distributed_type
    if found == DistributedType.NO:
        return "one"
    others = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
    require(found not in others, "train", "processes", "launched for DDP or FSDP2", found.value)
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"  # all that accelerate says of it on CPUs
    if found != DistributedType.FSDP and not asked:
        return "ddp"
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    require(plugin.fsdp_version == 2, "train", "fsdp_version", "2", plugin.fsdp_version)
    offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    require(not offloads, "train", "fsdp_offload_params", "false", "true", "use more processes")
    recomputes, hint = plugin.activation_checkpointing, "use memory_preset checkpoint"
    require(not recomputes, "train", "fsdp_activation_checkpointing", "false", "true", hint)
    dimensions = getattr(accelerator.parallelism_config, "active_mesh_dims", [])
    alone = set(dimensions) <= {"dp_shard"}
    require(alone, "train", "FSDP2", "one dimension, dp_shard", ", ".join(dimensions), verb="have")
    return "fsdp2"


def check_launcher(settings: TrainSettings) -> None:
    """Raises ArgumentError for what `accelerate launch` was asked for beside processes, and the settings do not do."""
    asked = {name: os.environ.get(f"ACCELERATE_{name}", "").lower() for name in _LAUNCHER}
    precision, steps, backend = asked.values()
    held = precision in ("", "no", settings.mixed_precision)
    require(held, "train", "mixed_precision", f"{precision}, as `accelerate launch` asks", settings.mixed_precision)
    number = settings.gradient_accumulation_steps
    held = steps in ("", "1", str(number))
    require(held, "train", "gradient_accumulation_steps", f"{steps}, as `accelerate launch` asks", number)
    held, got = backend in ("", "no") or settings.compile_blocks, f"false with dynamo_backend {backend}"
    require(held, "train", "compile_blocks", "true where `accelerate launch` asks for compilation", got)


def check_sharded(settings: TrainSettings, model: FlowModel, preset: MemoryPreset | None = None) -> None:
    """Raises ArgumentError, naming the setting, for what does not go with sharded weights.

    Args:
        model: before it is sharded.
        preset: what was, or will be, applied to it.
    """
    base, defer = quantised_form(model), model.deferral is not None
    base, defer = (base, defer) if preset is None else (base or preset.base, defer or preset.defer)
    name = settings.memory_preset if preset is None else preset.name
    lack = {
        "keeps modulation weights whole in host memory": defer,
        f"has an {base} base": base,
        "moves activations to the host, gathered weights among them": preset is not None and preset.offload_gb,
    }
    for what, found in lack.items():
        wanted = "batch, rows, 80gb, attention or checkpoint under FSDP2"
        require(not found, "train", "memory_preset", wanted, f"{name!r}, which {what}")
    saved, got = settings.optimizer != "adamw8bit", "adamw8bit: it could not be saved"
    require(saved, "train", "optimizer", "adamw or radam under FSDP2", got)
    beside, got = settings.ema_device == "cpu" and settings.model_type == "full", "cpu: each rank averages its shards"
    require(not beside, "train", "ema_device", "accelerator under FSDP2", got)


def _shard(model: FlowModel, accelerator: Any) -> None:
    """Shards the blocks, and the rest as one unit.

    accelerate's `prepare` wants the optimizer with the model, and leaves the rest gathered behind calls without
    gradient: a checkpoint, a teacher and an optimizer step behind an evaluation would then meet other tensors.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in (*repeated_blocks(model.network).values(), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def clip(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scales gradients down to a norm that they have together; nothing waits for the device.

    Args:
        parameters: sharded or not, with gradients or without; of sharded ones every rank must call it.
        max_norm: 0: only measure.

    Returns:
        Their norm before that, 0-dim, the same on all ranks; 0 without gradients.
    """
    given = list(parameters)
    gradients = [p.grad for p in given if p.grad is not None]
    norms = []
    for sharded in (False, True):
        found = [g for g in gradients if isinstance(g, DTensor) == sharded]
        if found:
            norm = nn.utils.get_total_norm(found)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return torch.zeros((), device=given[0].device if given else None)
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], scale)
    return total
