"""Offloaded activations: the same gradients bit for bit, whatever runs inside, and nothing left behind."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.batches import gradients
from helpers.family_batches import make_batch, make_student
from helpers.memory_cases import live_storages
from helpers.offload_cases import KB, Net, drained, equal, make
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef


@pytest.mark.parametrize("window", [0, 3 * KB, 1 << 20])
@pytest.mark.parametrize("budget_gb", [0.05, 1e-4])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_the_same_bits(checkpointed, budget_gb, window, transfers):
    net, x = Net(checkpointed), torch.randn(2, 16, 32) * 1
    net(x.clone()).backward()
    expected, offload = gradients(net), make(budget_gb, in_flight_bytes=window)
    for inside in (False, True):
        with offload:
            loss = net(x.clone())
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        del loss
        equal(gradients(net), expected)
    assert offload.stats.bytes_offloaded > 0 and offload.stats.peak_pool_bytes <= budget_gb * 1e9
    assert (offload.stats.bytes_kept > 0) == (budget_gb < 0.05 and not checkpointed)
    assert (offload.stats.bytes_restored > 0) == (window < 1 << 20 or transfers is None)
    assert drained(offload)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["qwen_image", "sd3", "sana"])
def test_a_real_transformer(family, checkpointed, transfers):
    student = make_student(family, "dual+sign")
    if checkpointed:
        student.network.enable_gradient_checkpointing()
    (x, cond, _), t, r = make_batch(family, student, 2), torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.5])
    student(x, t, r, cond).square().sum().backward()
    expected, offload = gradients(student), make()
    handle = offload.attach(student)
    student(x, t, r, cond).square().sum().backward()
    equal(gradients(student), expected)
    assert offload.stats.bytes_restored > 0 and drained(offload)
    handle.remove()
    before = offload.stats.tensors
    student(x, t, r, cond).square().sum().backward()
    assert offload.stats.tensors == before and "forward" not in vars(student)


@pytest.mark.parametrize("budget_gb", [0.05, 3e-4])
def test_several_graphs_and_backward_twice(budget_gb, transfers):
    net, inputs = Net(), [torch.randn(2, 16, 32) for _ in range(3)]
    sum(net(x) for x in inputs).backward()
    once = gradients(net)
    for x in reversed(inputs):
        net(x).backward()
    one_by_one, offload = gradients(net), make(budget_gb)
    with offload:
        losses = [net(x) for x in inputs]
    for loss in reversed(losses):
        loss.backward(retain_graph=True)
    equal(gradients(net), one_by_one)
    assert offload.stats.pool_bytes > 0
    sum(losses).backward()
    equal(gradients(net), once)
    del losses, loss
    assert drained(offload)


def test_second_derivatives(transfers):
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(128, 8)
    results = []
    for context in (torch.enable_grad(), make()):
        with context:
            leaf = (x.clone().requires_grad_() * 1).requires_grad_()
            (slope,) = torch.autograd.grad(net(leaf).sum(), leaf, create_graph=True)
        slope.square().sum().backward()
        results.append(gradients(net))
    equal(results[1], results[0])


def test_compiled():
    net, x = Net(), torch.randn(2, 16, 32)
    compiled = torch.compile(net, backend="aot_eager")
    compiled(x).backward()
    expected, offload = gradients(net), make()
    with offload:
        loss = compiled(x)
    loss.backward()
    equal(gradients(net), expected)
    assert offload.stats.bytes_restored > 0


def test_backward_on_other_threads_while_forward_goes_on():
    nets, offload = [Net() for _ in range(4)], make(0.002)
    x = torch.randn(2, 16, 32)
    expected = []
    for net in nets:
        net(x).backward()
        expected.append(gradients(net))

    def work(net):
        for _ in range(5):
            net.zero_grad()
            with offload:
                loss = net(x)
            loss.backward()

    with ThreadPoolExecutor(len(nets)) as threads:
        list(threads.map(work, nets))
    for net, gradient in zip(nets, expected, strict=True):
        equal(gradients(net), gradient)
    assert drained(offload)


# Nothing stays behind.


def test_fifty_steps_leave_what_two_leave(transfers):
    net, x, offload = Net(), torch.randn(2, 16, 32), make()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    handle = offload.attach(net)
    for step in range(50):
        net(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        if transfers is not None:
            for kept in (transfers.saves, transfers.loads, transfers.log):
                kept.clear()
        if step == 1:
            storages, peak = live_storages(), offload.stats.peak_pool_bytes
    assert live_storages() == storages and offload.stats.peak_pool_bytes == peak and drained(offload)
    pool = weakref.ref(offload._hooks)
    handle.remove()
    del offload, handle
    assert pool() is None, "the pool is freed with the last that uses it, not by a later collection"


@pytest.mark.parametrize("min_bytes", [0, 1 << 20])
def test_a_graph_that_is_dropped_gives_its_buffers_back(min_bytes, transfers):
    net, offload = Net(), make(min_bytes=min_bytes)
    gc.disable()  # outputs must not keep their own graphs alive
    try:
        with offload:
            result = net(torch.randn(2, 16, 32)).exp()
        storage = StorageWeakRef(result.untyped_storage())
        assert (offload.stats.pool_bytes > 0) == (min_bytes == 0)
        del result
        assert offload.stats.pool_bytes == 0 and storage.expired()
    finally:
        gc.enable()


def test_a_failed_forward_is_as_if_it_had_not_been(transfers):
    net, x, offload = Net(), torch.randn(2, 16, 32), make()
    net(x).backward()
    expected = gradients(net)
    hook = net.blocks[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    handle = offload.attach(net)
    with pytest.raises(ZeroDivisionError):
        net(x)
    hook.remove()
    assert drained(offload) and offload.stats.tensors > 0
    handle.remove()
    before = offload.stats.tensors
    net(x).backward()
    assert offload.stats.tensors == before, "hooks are left behind"
    gradients(net)
    with offload:
        loss = net(x)
    loss.backward()
    equal(gradients(net), expected)


def test_attached_among_the_wrappers_of_others():
    net, x, calls, offload = nn.Linear(8, 8), torch.randn(128, 8) * 1, [], make()
    net.forward = lambda *inputs: calls.append(1) or nn.Linear.forward(net, *inputs)
    theirs = net.forward
    first, second = offload.attach(net), offload.attach(net)
    first.remove()  # not the last that came: it can only fall silent
    net(x).sum().backward()
    assert len(calls) == 1 and offload.stats.tensors == 1
    second.remove()
    net(x).sum().backward()
    assert len(calls) == 2 and offload.stats.tensors == 1
    assert net.forward is not theirs or theirs is vars(net)["forward"]


def test_a_copy_of_an_attached_module_computes_with_its_own_weights():
    net, x, offload = Net(), torch.randn(2, 16, 32) * 1, make()
    handle = offload.attach(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.blocks[0].out.weight.mul_(2)
        tensors = offload.stats.tensors
        assert other(x) != net(x) and offload.stats.tensors == tensors == 0
    other(x).backward()
    assert offload.stats.tensors > 0 and all(p.grad is None for p in net.parameters())
    handle.remove()
    tensors = offload.stats.tensors
    other(x).backward()
    assert offload.stats.tensors == tensors
