"""DDP over two gloo processes: the step of one process on the whole batch."""

import os
import time
from dataclasses import fields

import pytest
import torch
import torch.multiprocessing as mp
from helpers.batches import COND, DIM, EIGHT, STARTED, assert_close, gradients, rows_of, toy_batch, toy_draws
from helpers.toy import ToyNet, make_teacher
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from twinflow import Draws, TwinFlowConfig, TwinFlowLoss

# name -> (config, rows per rank, kappa, how the step is run, steps)
SCENARIOS = {
    "given draws": (dict(), 4, 0.9, "given", 1),
    "given draws, all_terms": (dict(recipe="all_terms"), 4, 0.9, "given", 1),
    "given draws, by micro-batches": (dict(), 4, 0, "given micro-batches", 1),
    "counter": (dict(), 4, 0.9, "counter", 2),
    "counter, one row a rank": (dict(), 1, 0.9, "counter", 4),
    "counter, uneven roles": (dict(shares={"e2e": 1, "mul": 3, "any": 2, "adv": 1}), 3, 0, "counter", 2),
    "order 0, one row a rank": (dict(estimate_order=0, rectify_weight=0.0), 1, 0, "counter", 4),
    "order 0, by micro-batches": (dict(estimate_order=0, rectify_weight=0.0), 2, 0, "counter micro-batches", 4),
    "data-free, by micro-batches": (dict(data_free=True), 3, 1, "counter micro-batches", 2),
    "all_terms, by micro-batches": (dict(recipe="all_terms"), 2, 0.9, "counter micro-batches", 1),
    "compiled wrapper": (dict(estimate_order=0, rectify_weight=0.0), 1, 0, "compiled", 4),
}


class Buffered(ToyNet):
    """With a buffer, which DDP broadcasts on each of its calls."""

    def __init__(self):
        super().__init__(DIM, COND, dtype=torch.float64)
        self.register_buffer("table", torch.ones(DIM))


def given(config):
    torch.manual_seed(3)
    batch = toy_batch(8, torch.float64)
    return batch, toy_draws(config, batch[0], EIGHT if config.recipe == "partition" else None)


def joined(parts):
    """The draws of all ranks as one."""
    values = {}
    for name in (f.name for f in fields(Draws)):
        found = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        whole = sum(found, ()) if name == "roles" else torch.cat(found) if found else None
        values[name] = None if not found else whole
    return Draws(**values)


def run_scenario(name, rank):
    options, rows, kappa, how, steps = SCENARIOS[name]
    config, criterion = TwinFlowConfig(**options), TwinFlowLoss(TwinFlowConfig(**options))
    torch.manual_seed(0)
    net = Buffered()
    student = DistributedDataParallel(net)
    syncs = []

    def counting(state, bucket):
        syncs.append(1)
        return allreduce_hook(None, bucket)

    student.register_comm_hook(None, counting)
    called = torch.compile(student, backend="eager") if how == "compiled" else student
    teacher, generator, results = make_teacher(called, kappa), torch.Generator().manual_seed(rank), []
    for _ in range(steps):
        arguments = dict(teacher=teacher, generator=generator)
        batch = [torch.randn(rows, x.shape[1], generator=generator, dtype=torch.float64) for x in toy_batch(1)]
        if how.startswith("given"):
            (batch, draws), mine = given(config), slice(rank * rows, rank * rows + rows)
            batch = [x[mine] for x in batch]
            arguments |= dict(draws=rows_of(draws, mine.start, mine.stop), step_rows=rows)
        syncs.clear()
        if how.endswith("micro-batches"):
            out = criterion.backward(called, *batch, micro_batch=2 if rows > 2 else 1, **arguments)
        else:
            out = criterion(called, *batch, **arguments)
            out.loss.backward()
        result = (out.loss.detach(), gradients(net))
        results.append({"batch": batch, "draws": vars(out.draws), "result": result, "syncs": len(syncs)})
    return results


def worker(rank, folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save({name: run_scenario(name, rank) for name in SCENARIOS}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Every scenario on two processes, once."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.start_processes(worker, (folder,), nprocs=2, join=False, start_method=STARTED)
    deadline = time.monotonic() + 300
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks wait for each other")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_are_one_process(ranks, name):
    """Gradients averaged over the ranks are those of the whole batch; the ranks' losses average to its loss."""
    options, rows, kappa, how, _ = SCENARIOS[name]
    config = TwinFlowConfig(**options)
    criterion = TwinFlowLoss(config)
    torch.manual_seed(0)
    net = Buffered()
    teacher = make_teacher(net, kappa)
    for steps in zip(*(found[name] for found in ranks), strict=True):
        draws = joined([Draws(**found["draws"]) for found in steps])
        batch = [torch.cat(parts) for parts in zip(*(found["batch"] for found in steps), strict=True)]
        step_rows = 2 * rows if how.startswith("given") else None
        if step_rows is None and config.recipe == "partition":
            assert draws.roles == criterion.draw(batch[0]).roles, "the roles of both ranks are one sequence"
        out = criterion(net, *batch, teacher=teacher, draws=draws, step_rows=step_rows)
        out.loss.backward()
        expected = out.loss.detach(), gradients(net)
        loss = sum(found["result"][0] for found in steps) / 2
        for found in steps:
            assert_close((loss, found["result"][1]), expected, 1e-6)
            assert found["syncs"] == 1, "gradients are synchronised once a step"
