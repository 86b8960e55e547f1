"""Runs under DDP and FSDP2 on two gloo processes: the run of one process on all rows, and a resumed one."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.family_batches import Graphs, make_batch
from helpers.ranked_steps import MICRO, Run, assert_same_run, on_two_ranks, one_process, settings_of
from torch.distributed.tensor import DTensor

from twinflow.distributed import gather_bytes
from twinflow.train.checkpoint.checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint

# name -> (settings, tolerance); bfloat16 sums over blocks are rounded in another order where blocks are units
CASES: dict[str, tuple[dict, float]] = {
    "ddp, lora": (dict(model_type="lora"), 1e-4),
    "ddp, full": (dict(model_type="full"), 1e-4),
    "fsdp2, lora": (dict(model_type="lora"), 1e-4),
    "fsdp2, full, products kept": (dict(model_type="full", memory_preset="80gb"), 1e-4),
    "fsdp2, lora on bfloat16, blocks computed again": (dict(mixed_precision="bf16", memory_preset="checkpoint"), 5e-3),
}


def every_run(accelerator: Accelerator, kind: str, folder: Path) -> None:
    for number, (name, (more, _)) in enumerate(CASES.items()):
        if name.startswith(kind):
            run = Run(settings_of(**more), accelerator).advance(3)
            assert any(isinstance(p, DTensor) for p in run.model.parameters()) == (kind == "fsdp2")
            write_checkpoint(folder / str(number), 3, run.state.collect())
    if kind == "fsdp2":
        one_row_each(accelerator)
        looked_at(accelerator)
        compiled(accelerator)
        resumed(accelerator, folder / "resumed")


def one_row_each(accelerator: Accelerator) -> None:
    """Rows that need different numbers of teacher calls: both ranks make the same calls, and none waits."""
    run, rank, called = Run(settings_of(), accelerator), accelerator.process_index, []
    velocity = run.teacher.velocity
    run.teacher.velocity = lambda *row, **more: called.append(1) or velocity(*row, **more)
    for number, roles in enumerate((("e2e", "adv", "mul", "any"), ("adv", "any", "e2e", "mul"))):
        assert run.backward(number, roles, slice(rank, rank + 1), 1, True).isfinite()
        assert len(set(gather_bytes(bytes(called)))) == 1
    assert all(p.grad is not None and p.grad.to_local().isfinite().all() for p in run.state._trained().values())


def looked_at(accelerator: Accelerator) -> None:
    """A call without gradient leaves shards: an optimizer step behind it counts, a state can be collected."""
    run = Run(settings_of(), accelerator)
    rows = make_batch("sd3", run.model, 2)
    run.backward(0, MICRO[0], slice(0, 2), 2, True)
    velocities = []
    for _ in range(2):
        with torch.no_grad():
            velocities.append(run.student(rows[0], torch.full((2,), 0.9), torch.zeros(2), rows[1]))
        assert all(isinstance(p, DTensor) for p in run.model.parameters())
        assert run.state.collect()["shared"]["optimizer"]["kind"] == "torch.AdamW"
        run.optimizer.step()
    assert not torch.equal(*velocities)


def compiled(accelerator: Accelerator) -> None:
    """Blocks that are compiled before they are sharded compute what the others do, the teacher's too."""
    plain, graphs = Run(settings_of(), accelerator).advance(2), Graphs()
    whole = Run(settings_of(), accelerator, backend=graphs).advance(2)
    assert whole.extra["losses"] == pytest.approx(plain.extra["losses"], rel=1e-5) and graphs.count > 0


def resumed(accelerator: Accelerator, folder: Path) -> None:
    """A step, a checkpoint, another step; another run from the checkpoint ends with the same bits."""
    for name in ("lora", "full"):
        whole = Run(settings_of(model_type=name), accelerator).advance(1)
        path = write_checkpoint(folder / name, 1, whole.state.collect())
        whole.advance(1)
        other = Run(settings_of(model_type=name), accelerator, seed=6)
        other.state.restore(read_checkpoint(path))
        other.advance(1)
        assert other.extra == whole.extra and len(whole.extra["losses"]) == 2
        for a, b in ((whole.teacher.parameters(), other.teacher.parameters()),
                     (whole.state._trained(), other.state._trained())):  # fmt: skip
            assert all(isinstance(value, DTensor) and value.dtype == torch.float32 for value in b.values())
            assert all(torch.equal(a[n].to_local(), b[n].to_local()) for n in a) and a.keys() == b.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of every run, each kind in two processes."""
    found = tmp_path_factory.mktemp("ranks")
    settings_of()  # the pipeline, once for all
    for kind in ("ddp", "fsdp2"):
        on_two_ranks(kind, every_run, kind, found)
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(folder, name):
    more, tolerance = CASES[name]
    found = read_checkpoint(latest_checkpoint(folder / str(list(CASES).index(name))))
    assert_same_run(found, one_process(settings_of(**more)), tolerance)
