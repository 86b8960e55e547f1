"""The objective on a CUDA device: recorded steps, no host sync, equal bits, a captured EMA, agreement with the CPU."""

import pytest
import torch
from helpers.toy import GoldenNet, ToyNet, golden_cases, golden_config, golden_draws, make_teacher

from twinflow import Draws, TwinFlowConfig, TwinFlowLoss
from twinflow_kernels import ema_update_

pytestmark = pytest.mark.gpu
CASES = golden_cases()


def on_cuda(draws: Draws) -> Draws:
    """Noises on the device, times on the host."""
    move = {name: getattr(draws, name) for name in ("z", "z_fake", "z_data", "z_rectify")}
    move = {name: None if value is None else value.cuda() for name, value in move.items()}
    return Draws(roles=draws.roles, t=draws.t, r=draws.r, t_rectify=draws.t_rectify, **move)


@pytest.mark.parametrize("mode", ["planned", "published", "rows"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_step(case, mode):
    net, step = GoldenNet(case["params"]).cuda(), case["steps"][0]
    x, cond, uncond = (torch.tensor(step[n], dtype=torch.float64, device="cuda") for n in ("x", "cond", "uncond"))
    criterion = TwinFlowLoss(golden_config(case))
    arguments = dict(teacher=make_teacher(net, case["config"]["ema_decay_rate"]), draws=on_cuda(golden_draws(step)))
    if mode == "rows":
        out = criterion.backward(net, x, cond, uncond, **arguments)
    else:
        out = criterion(net, x, cond, uncond, schedule=mode, **arguments)
        out.loss.backward()
    assert out.loss.item() == pytest.approx(step["loss"], rel=1e-6)
    for name, parameter in net.named_parameters():
        recorded = torch.tensor(step["grads"][name], dtype=torch.float64)
        assert (parameter.grad.cpu() - recorded).norm() < 1e-5 * recorded.norm()


@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_never_waits_for_the_device(recipe, dtype):
    """Drawing, planning, running and differentiating a step under torch's synchronisation check."""
    net = ToyNet(dtype=dtype).cuda()
    criterion, teacher = TwinFlowLoss(TwinFlowConfig(recipe=recipe)), make_teacher(net, 0.9)
    x, cond, uncond = (torch.randn(n, d, device="cuda", dtype=dtype) for n, d in ((8, 5), (8, 3), (1, 3)))
    generator = torch.Generator("cuda").manual_seed(0)
    criterion(net, x, cond, uncond, teacher=teacher, generator=generator).loss.backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = criterion(net, x, cond, uncond, teacher=teacher, generator=generator)
        out.loss.backward()
        criterion.backward(net, x, cond, uncond, teacher=teacher, generator=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_equal_bits_twice_and_the_cpu_nearly(recipe):
    net = ToyNet()
    criterion = TwinFlowLoss(TwinFlowConfig(recipe=recipe))
    x, cond, uncond = torch.randn(8, 5), torch.randn(8, 3), torch.randn(1, 3)
    draws = criterion.draw(x, torch.Generator().manual_seed(3))
    results = []
    for device in ("cpu", "cuda", "cuda"):
        net = net.to(device)
        net.zero_grad()
        given = draws if device == "cpu" else on_cuda(draws)
        tensors = (v.to(device) for v in (x, cond, uncond))
        out = criterion(net, *tensors, teacher=make_teacher(net, 0.9), draws=given)
        out.loss.backward()
        results.append([out.loss.detach().cpu(), *(p.grad.cpu().clone() for p in net.parameters())])
    for host, first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, host, rtol=2e-3, atol=2e-4 * host.abs().max().item())


def test_cuda_generator_reproduces_a_step():
    criterion, latents = TwinFlowLoss(), torch.zeros(8, 5, device="cuda")
    a = criterion.draw(latents, torch.Generator("cuda").manual_seed(4))
    criterion.load_state_dict({"roles": {"counts": {"e2e": 0, "mul": 0, "any": 0, "adv": 0}}})
    b = criterion.draw(latents, torch.Generator("cuda").manual_seed(4))
    assert torch.equal(a.t, b.t) and torch.equal(a.z, b.z) and a.t.device.type == "cpu" and a.z.device.type == "cuda"
    c = criterion.draw(latents, torch.Generator("cuda").manual_seed(4))
    assert not torch.equal(a.t, c.t), "the next step of the stream must have times of its own"


def test_ema_in_a_cuda_graph_reads_its_decay_from_the_device():
    targets = [torch.randn(1000, device="cuda") for _ in range(3)]
    sources = [torch.randn(1000, device="cuda").bfloat16() for _ in range(3)]
    decay = torch.tensor(0.5, device="cuda")
    before = [t.clone() for t in targets]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ema_update_([t.clone() for t in targets], sources, decay)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(targets, sources, decay)
    for value in (0.25, 0.75):
        decay.fill_(value)
        for t, start in zip(targets, before, strict=True):
            t.copy_(start)
        graph.replay()
        torch.cuda.synchronize()
        for t, start, s in zip(targets, before, sources, strict=True):
            torch.testing.assert_close(t, value * start + (1 - value) * s.float())
