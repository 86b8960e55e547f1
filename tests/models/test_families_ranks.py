"""A conditioned LoRA student of a real class under DDP, its modulation deferred or not: the step of one process."""

import os
import time
from contextlib import nullcontext

import pytest
import torch
import torch.multiprocessing as mp
from helpers.batches import EIGHT, STARTED, gradients, rows_of, toy_draws
from helpers.family_batches import make_batch, make_student, spread
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.lora import add_lora
from twinflow.memory.modulation.defer import defer_modulation


def ranks_step(rank=None):
    """{how: (loss, gradients)} of a step of eight rows, or of a rank's four of them."""
    torch.manual_seed(5)
    student = spread(add_lora(make_student("sd3", "dual+sign"), 2))
    config, batch = TwinFlowConfig(delta_t=0.5), make_batch("sd3", student, 8)
    draws, called, results = toy_draws(config, batch[0], EIGHT), student, {}
    if rank is not None:
        rows = slice(4 * rank, 4 * rank + 4)
        draws = rows_of(draws, rows.start, rows.stop)
        batch = [batch[0][rows], *({name: leaf[rows] for name, leaf in cond.items()} for cond in batch[1:])]
        called = DistributedDataParallel(student, find_unused_parameters=True)
    for how in ("whole", "pieces", "whole, deferred", "pieces, deferred"):
        teacher = EMATeacher(called, 0.9, adapter=how)
        arguments = dict(teacher=teacher, draws=draws, step_rows=len(batch[0]))
        with defer_modulation(called) if "deferred" in how and rank is not None else nullcontext():
            if "whole" in how:
                out = TwinFlowLoss(config)(called, *batch, **arguments)
                out.loss.backward()
            else:
                out = TwinFlowLoss(config).backward(called, *batch, **arguments)
        trained = {n for n, p in student.named_parameters() if p.requires_grad}
        results[how] = out.loss.item(), {n: g for n, g in gradients(student).items() if n in trained}
    return results


def worker(rank, folder):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(ranks_step(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_are_one_process(tmp_path):
    """Gradients of adapters and conditioning, averaged over the ranks, are those of the whole batch."""
    context = mp.start_processes(worker, (tmp_path,), nprocs=2, join=False, start_method=STARTED)
    expected, deadline = ranks_step(), time.monotonic() + 200
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks wait for each other")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for how, (loss, wanted) in expected.items():
        assert sum(rank[how][0] for rank in ranks) / 2 == pytest.approx(loss, rel=1e-4)
        size = max(value.norm() for value in wanted.values())
        assert any("time_text_embed_2" in name and value.any() for name, value in wanted.items())
        for rank in ranks:
            assert rank[how][1].keys() == wanted.keys()
            assert all((rank[how][1][name] - value).norm() < 1e-4 * size for name, value in wanted.items())
