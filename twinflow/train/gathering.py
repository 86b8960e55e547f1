"""What the ranks of a run tell each other around a checkpoint: bytes, never pickled objects."""

import json
from collections.abc import Callable

import torch
from torch import distributed

from twinflow.distributed import world


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
        others = [text.decode() for text in gather_bytes(str(failure or "").encode())]
        first = next((number for number, text in enumerate(others) if text), None)
        if failure is None and first is not None:
            raise ValueError(f"{where}: rank {first} failed with {others[first]}")
    if failure is not None:
        raise failure
