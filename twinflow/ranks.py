"""What the ranks of a distributed run must agree on."""

import torch
from torch import distributed

from twinflow.interface import Student, data_parallel, unwrap


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def kept_calls(student: Student | None) -> str:
    """Which calls every rank must run alike (see plan.Request)."""
    if student is not None and data_parallel(student) is not None:
        return "student"
    module = unwrap(student) if student is not None else None
    if isinstance(module, torch.nn.Module) and distributed.is_available() and distributed.is_initialized():
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.tensor import DTensor

        # FSDP2, FSDP1, and the parameters of DeepSpeed ZeRO-3
        if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters()) or any(
            isinstance(m, FullyShardedDataParallel) for m in module.modules()
        ):
            return "all"
    return "none"
