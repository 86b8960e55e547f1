"""What the ranks of a distributed run must agree on."""

from typing import Any

import torch
from torch import distributed

from twinflow.interface import Student, data_parallel, unwrap

_host_groups: list[tuple[Any, Any]] = []  # the process group that was asked for one, and its own on the CPU; the latest


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def any_rank(flag: bool) -> bool:
    """Whether any rank raises a flag; every rank must ask, at the same place. Nothing waits for a GPU."""
    if world()[1] == 1:
        return flag
    raised = torch.tensor(int(flag), dtype=torch.int32)
    distributed.all_reduce(raised, distributed.ReduceOp.MAX, group=_host_group())
    return bool(raised)


def _host_group() -> Any:
    """All ranks over gloo, made at the first call."""
    everyone = distributed.group.WORLD
    if not _host_groups or _host_groups[0][0] is not everyone:
        _host_groups[:] = [(everyone, distributed.new_group(backend="gloo"))]
    return _host_groups[0][1]


def calls_in_lockstep(student: Student | None) -> str:
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
