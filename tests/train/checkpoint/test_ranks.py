"""Checkpoints of two processes: replicated and sharded students, streams of each rank, failures that all hear of."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from helpers.train_runs import Position
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from twinflow.distributed import gather_bytes
from twinflow.train.checkpoint import checkpoint
from twinflow.train.checkpoint.checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint
from twinflow.train.checkpoint.run_state import RunState


def worker(rank: int, work, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    work(rank, folder)
    distributed.destroy_process_group()


def on_two_ranks(work, folder: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = mp.start_processes(worker, (work, folder), nprocs=2, join=False, start_method="fork")
    deadline = time.monotonic() + 60
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks wait for each other")


def sharded(seed: int) -> RunState:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))  # 7 rows on two ranks, and 3
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(distributed.get_rank())
    return RunState(net, optimizer=optimizer, generators={"data": generator}, batches=Position(), extra={})


def sharded_steps(state: RunState, steps: int) -> None:
    for _ in range(steps):
        state.student(torch.randn(4, 5, generator=state.generators["data"])).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.batches.at += 1 + distributed.get_rank()


def sharded_work(rank: int, folder: Path) -> None:
    whole = sharded(0)
    sharded_steps(whole, 2)
    path = write_checkpoint(folder, 2, whole.collect())
    assert latest_checkpoint(folder) == path
    tree = read_checkpoint(path)
    assert [piece["batches"]["at"] for piece in tree["ranks"]] == [2, 4]
    assert tree["shared"]["student"]["0.weight"].shape == (7, 5)
    resumed = sharded(1)
    resumed.restore(tree)
    sharded_steps(whole, 2)
    sharded_steps(resumed, 2)
    assert resumed.batches.at == 4 * (1 + rank)
    pairs = zip(whole.student.parameters(), resumed.student.parameters(), strict=True)
    for mine, theirs in pairs:
        assert isinstance(theirs, DTensor) and torch.equal(mine.to_local(), theirs.to_local())
        moments = (whole.optimizer.state[mine]["exp_avg"], resumed.optimizer.state[theirs]["exp_avg"])
        assert isinstance(moments[1], DTensor) and torch.equal(moments[0].to_local(), moments[1].to_local())
    with pytest.raises(ValueError, match=r"restore: .*(rank 1 failed with|as many processes)"):
        resumed.restore({**tree, "ranks": tree["ranks"][: 2 - rank]})  # wrong on one rank, refused on both
    if rank == 1:
        resumed.generators.pop("data")
    with pytest.raises(ValueError, match=r"generators must have the names|rank 1 failed with"):
        resumed.restore(tree)


def failing_work(rank: int, folder: Path) -> None:
    assert gather_bytes(bytes([rank]) * (rank * 3)) == [b"", b"\1\1\1"]
    for tree, error in (({"a": object()}, TypeError), ({"a": 1}, OSError)):
        if error is OSError:
            checkpoint.write_files = full
        with pytest.raises(error if rank == 0 else (OSError if error is OSError else RuntimeError)) as raised:
            write_checkpoint(folder, 1, tree)
        assert rank == 0 or "write_checkpoint: rank 0 failed with" in str(raised.value)
    assert latest_checkpoint(folder) is None


def full(*args: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("work", [sharded_work, failing_work])
def test_two_ranks(tmp_path, work):
    on_two_ranks(work, tmp_path)
