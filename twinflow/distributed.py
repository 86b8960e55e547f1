"""Ranks and parallel wrappers: what a process asks of torch.distributed, DDP and FSDP, in one place.

Ranks exchange bytes, never pickled objects.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed, nn

Network = TypeVar("Network", bound=Callable)

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


def calls_in_lockstep(student: Any) -> str:
    """Which calls every rank must run alike: `none`, `student` or `all` (PlanOptions.pad_calls)."""
    if student is not None and data_parallel(student) is not None:
        return "student"
    module = unwrap(student) if student is not None else None
    if isinstance(module, nn.Module) and distributed.is_available() and distributed.is_initialized():
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.tensor import DTensor

        # FSDP2, FSDP1, and the parameters of DeepSpeed ZeRO-3
        if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters()) or any(
            isinstance(m, FullyShardedDataParallel) for m in module.modules()
        ):
            return "all"
    return "none"


def unwrap(student: Any) -> Any:
    """The module inside torch.compile and data-parallel wrappers; anything else as it is."""
    while True:
        # A module that torch.compile has made keeps the original as a submodule; getattr on others is slow to fail.
        modules = student._modules if isinstance(student, nn.Module) else getattr(student, "__dict__", {})
        inner = modules.get("_orig_mod")
        if inner is None and isinstance(student, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = student.module
        if inner is None:
            return student
        student = inner


def data_parallel(student: Any) -> nn.parallel.DistributedDataParallel | None:
    """The DDP wrapper of a student, compiled or not; None where there is none."""
    if isinstance(student, nn.Module):
        student = student._modules.get("_orig_mod", student)
    return student if isinstance(student, nn.parallel.DistributedDataParallel) else None


def without_collectives(student: Network) -> Network:
    """What to call without gradient: under DDP the module inside.

    The wrapper broadcasts buffers on every call, and ranks run different numbers of calls without gradient.
    """
    wrapper = data_parallel(student)
    return student if wrapper is None else wrapper.module


def gather_bytes(data: bytes) -> list[bytes]:
    """Every rank's bytes, on every rank; each must call it."""
    _, ranks = world()
    if ranks == 1:
        return [data]
    on_cpu = "cpu:" in distributed.get_backend_config() and "cpu:nccl" not in distributed.get_backend_config()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    distributed.all_gather(sizes, torch.tensor([len(data)], device=device))
    lengths = [int(size) for size in sizes]
    mine = torch.zeros(max(*lengths, 1), dtype=torch.uint8)
    if data:
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    mine = mine.to(device)
    all_of_them = [torch.empty_like(mine) for _ in range(ranks)]
    distributed.all_gather(all_of_them, mine)
    return [part[:n].cpu().numpy().tobytes() for part, n in zip(all_of_them, lengths, strict=True)]


def on_rank_zero(where: str, work: Callable[[], str]) -> str:
    """Runs on rank 0 what the others wait for, and gives its text to all.

    Args:
        where: the public function, for messages.
        work: what is done; a process without ranks does it too.

    Raises:
        Whatever it raises, on rank 0; on the others OSError where it was one, else RuntimeError.
    """
    rank, ranks = world()
    if ranks == 1:
        return work()
    told, failure = b"", None
    if rank == 0:
        try:
            told = json.dumps(["done", work()]).encode()
        except BaseException as error:  # told to the others, then raised
            kind = "system" if isinstance(error, OSError) else "other"
            told, failure = json.dumps([kind, f"{type(error).__name__}: {error}"]).encode(), error
    kind, text = json.loads(gather_bytes(told)[0])
    if failure is not None:
        raise failure
    if kind != "done":
        raise (OSError if kind == "system" else RuntimeError)(f"{where}: rank 0 failed with {text}")
    return str(text)


def check_on_all_ranks(where: str, check: Callable[[], None]) -> None:
    """Runs a check on every rank, and raises on all of them if it fails on one, so that none waits for another.

    Raises:
        What it raises here; ValueError where it fails on other ranks only.
    """
    failure = None
    try:
        check()
    except Exception as error:
        failure = error
    if world()[1] > 1:
        others = [text.decode() for text in gather_bytes(str(failure or "").encode(errors="backslashreplace"))]
        first = next((number for number, text in enumerate(others) if text), None)
        if failure is None and first is not None:
            raise ValueError(f"{where}: rank {first} failed with {others[first]}")
    if failure is not None:
        raise failure
