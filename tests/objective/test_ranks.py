"""Ranks that share collectives run the same calls in the same order, and the discarded rows change nothing."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from helpers.batches import STARTED
from helpers.toy import ToyNet, make_teacher
from torch import distributed

from twinflow import StudentTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.objective import loss
from twinflow.objective.draws import draw_step
from twinflow.objective.plan import PlanOptions, make_plan

ROLES = [("e2e", "mul"), ("any", "adv"), ("mul", "mul"), ("adv", "adv"), ("e2e", "e2e"), ("any", "any")]


def shape_of(plan):
    return [(p.name, p.segment, p.micro_batch, p.gradient, p.who) for p in plan.calls]


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_rank_plans_the_same_calls(order, micro_batch):
    config = TwinFlowConfig(estimate_order=order, data_free=True)
    request = PlanOptions(pad_calls="all", micro_batch=micro_batch)
    plans = [make_plan(config, draw_step(config, torch.zeros(2, 5), r, None, 0), request) for r in ROLES]
    assert all(shape_of(plan) == shape_of(plans[0]) for plan in plans)
    bare = [make_plan(config, draw_step(config, torch.zeros(2, 5), r, None, 0)) for r in ROLES]
    assert len({len(plan.calls) for plan in bare}) > 1, "without keeping step the calls would be the same anyway"


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("roles", ROLES)
def test_discarded_rows_change_nothing(roles, order, monkeypatch):
    net, config = ToyNet(dtype=torch.float64), TwinFlowConfig(estimate_order=order)
    x, cond, uncond = torch.randn(2, 5).double(), torch.randn(2, 3).double(), torch.randn(1, 3).double()
    criterion, draws = TwinFlowLoss(config), draw_step(config, x, roles, None, 0)
    results = []
    for keep in ("none", "all"):
        monkeypatch.setattr(loss, "calls_in_lockstep", lambda student, keep=keep: keep)
        net.zero_grad()
        out = criterion(net, x, cond, uncond, teacher=make_teacher(net, 0.9), draws=draws)
        out.loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
        results.append([out.loss.detach(), *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def sharded_worker(rank, file, results):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = ToyNet()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    x, cond, uncond, draws = sharded_batch()
    mine = slice(2 * rank, 2 * rank + 2)
    criterion = TwinFlowLoss()
    out = criterion(
        net, x[mine], cond[mine], uncond, teacher=StudentTeacher(net), draws=draws[rank], step_rows=2
    )  # fmt: skip
    out.loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in net.named_parameters()}
    if rank == 0:
        torch.save(gradients, results)
    distributed.barrier()
    distributed.destroy_process_group()


def sharded_batch():
    """Four rows whose two halves need different calls; draws of each half."""
    generator = torch.Generator().manual_seed(5)
    x, cond, uncond = (torch.randn(n, d, generator=generator) for n, d in ((4, 5), (4, 3), (1, 3)))
    draws = [draw_step(TwinFlowConfig(), x[:2], roles, generator, 0) for roles in (("e2e", "mul"), ("any", "adv"))]
    return x, cond, uncond, draws


def test_fsdp2_equals_one_process(tmp_path):
    """Two gloo processes with a sharded student and different roles: the gradients of the whole step."""
    results = tmp_path / "gradients.pt"
    mp.start_processes(sharded_worker, (tmp_path / "rendezvous", results), nprocs=2, start_method=STARTED)
    torch.manual_seed(0)
    net = ToyNet()
    x, cond, uncond, draws = sharded_batch()
    criterion = TwinFlowLoss()
    for k, own in enumerate(draws):
        mine = slice(2 * k, 2 * k + 2)
        criterion(
            net, x[mine], cond[mine], uncond, teacher=StudentTeacher(net), draws=own, step_rows=4
        ).loss.backward()  # fmt: skip
    for name, gradient in torch.load(results).items():
        expected = net.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
