"""Activation offload on a CUDA device: equal bits under every delay, transfers behind computation, no host sync."""

import pytest
import torch
from helpers.batches import gradients
from helpers.cuda_steps import delayed, lora_student_and_batch, time_ms
from helpers.family_batches import FAMILIES
from helpers.offload_cases import Net, equal
from torch.utils.checkpoint import checkpoint

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.memory.offload.activations import offload_activations
from twinflow.memory.offload.host_pool import CudaTransfers

pytestmark = pytest.mark.gpu
MB = 1 << 20


class Stack(torch.nn.Module):
    """Checkpointed blocks of six products of one weight: 64 MB saved per block, 6.6 TFLOP forward per step."""

    def __init__(self, blocks=12, width=8192):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, width, device="cuda", dtype=torch.bfloat16) / width**0.5)
        self.blocks = blocks

    def products(self, x):
        for _ in range(6):
            x = x @ self.weight
        return x

    def forward(self, x):
        for _ in range(self.blocks):
            x = checkpoint(self.products, x, use_reentrant=False)
        return x.float().square().mean()


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("window", [0, 1 << 18, 1 << 30])
@pytest.mark.parametrize("late", ["", "save", "load"])
def test_gradients_are_the_same_bits_however_late_copies_are(late, window, pinned, monkeypatch):
    if late:
        stream = {"save": "_out", "load": "_in"}[late]
        monkeypatch.setattr(CudaTransfers, late, delayed(getattr(CudaTransfers, late), stream))
    net, inputs = Net().cuda(), [torch.randn(64, 16, 32, device="cuda") for _ in range(3)]
    expected = []
    for x in inputs:
        net(x).backward()
        expected.append(gradients(net))
    offload = offload_activations(0.05, min_bytes=0, pin_memory=pinned, in_flight_bytes=window)
    handle = offload.attach(net)
    for x, gradient in zip(inputs, expected, strict=True):
        net(x).backward()
        equal(gradients(net), gradient)
    losses = [net(x) for x in inputs]
    for loss, gradient in zip(losses, expected, strict=True):
        loss.backward()
        equal(gradients(net), gradient)
    del loss, losses
    assert offload.stats.pool_bytes == 0 and (offload.stats.bytes_restored > 0 or window == 1 << 30)
    handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_offload_is_the_same_and_never_waits_for_the_device(family):
    student, batch = lora_student_and_batch(family)
    criterion, teacher = TwinFlowLoss(TwinFlowConfig()), EMATeacher(student, 0.9)
    draws, results = criterion.draw(batch[0], torch.Generator("cuda").manual_seed(0)), []
    arguments = dict(teacher=teacher, draws=draws, update_teacher=False)
    criterion.backward(student, *batch, **arguments)
    gradients(student)
    criterion.backward(student, *batch, **arguments)
    results.append(gradients(student))
    offload = offload_activations(0.2, min_bytes=0, in_flight_bytes=1 << 16)
    handle = offload.attach(student)
    for _ in range(2):
        gradients(student)
        criterion.backward(student, *batch, **arguments)
    gradients(student)
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion.backward(student, *batch, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    handle.remove()
    equal(gradients(student), results[0])
    assert offload.stats.bytes_restored > 0 and offload.stats.pool_bytes == 0


def test_transfers_hide_behind_computation():
    """A step with transfers takes far less than the step alone and the transfers alone together."""
    net, x = Stack(), torch.randn(4096, 8192, device="cuda", dtype=torch.bfloat16)
    offload = offload_activations(1.0, in_flight_bytes=256 * MB)

    def step():
        net(x).backward()
        net.weight.grad = None

    alone = time_ms(step)
    handle = offload.attach(net)
    before = offload.stats
    together = time_ms(step)
    after = offload.stats
    handle.remove()
    out, back = ((getattr(after, f"bytes_{name}") - getattr(before, f"bytes_{name}")) // 7
                 for name in ("offloaded", "restored"))  # fmt: skip
    host = torch.empty(out, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(out, dtype=torch.uint8, device="cuda")

    def transfers():
        host.copy_(device, non_blocking=True)
        device[:back].copy_(host[:back], non_blocking=True)

    copied = time_ms(transfers)
    print(f"step {alone:.1f} ms, transfers {copied:.1f} ms, together {together:.1f} ms")
    assert out >= 11 * 64 * MB and back >= 7 * 64 * MB
    assert together < alone + copied / 2


def test_memory_drops_to_the_window_and_does_not_creep():
    net, window = Stack(blocks=16, width=1024), 8 * MB
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    peaks, held = [], []
    offload = offload_activations(0.5, in_flight_bytes=window)
    for attached in (False, True):
        handle = offload.attach(net) if attached else None
        net(x).backward()  # allocates the gradient and the libraries' workspaces
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = net(x)
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        del loss
        peaks.append(torch.cuda.max_memory_allocated() - before)
        for _ in range(20):
            net(x).backward()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
    handle.remove()
    assert held[0] >= 15 * 8 * MB and held[1] <= window + MB
    assert peaks[1] <= peaks[0] - 11 * 8 * MB
    assert offload.stats.pool_bytes == 0


def test_a_graph_that_is_dropped_gives_memory_and_buffers_back():
    net, x = Net().cuda(), torch.randn(64, 16, 32, device="cuda")
    offload = offload_activations(0.05, min_bytes=0, in_flight_bytes=1 << 30, device="cuda")
    net(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with offload:
        loss = net(x)
    assert torch.cuda.memory_allocated() > before and offload.stats.pool_bytes > 0
    del loss
    assert torch.cuda.memory_allocated() == before and offload.stats.pool_bytes == 0


def test_the_pool_is_pinned_and_taken_when_the_offload_is_made():
    offload = offload_activations(0.01)
    slabs = offload._hooks._pool._slabs
    assert sum(map(len, slabs)) == 10_000_000 // 4096 * 4096 and all(slab.is_pinned() for slab in slabs)
    assert not any(slab.is_pinned() for slab in offload_activations(0.01, pin_memory=False)._hooks._pool._slabs)


def test_a_module_that_moves_to_the_host_is_an_error():
    net, x = Net().cuda(), torch.randn(64, 16, 32, device="cuda")
    offload = offload_activations(0.05, min_bytes=0)
    handle = offload.attach(net)
    net(x).backward()
    net.cpu()
    with pytest.raises(RuntimeError, match="module must be on cuda:0, whose tensors are offloaded, got it on cpu"):
        net(x.cpu())
    handle.remove()
