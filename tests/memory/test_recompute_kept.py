"""What blocks keep: bytes by hand, through the hooks around them, and for how long."""

import gc
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from helpers.batches import gradients
from helpers.memory_cases import live_storages
from helpers.recompute_cases import HEADS, ROWS, TOKENS, WIDTH, Net, count_calls, inputs, same, step
from torch.multiprocessing.reductions import StorageWeakRef

from twinflow.memory.recompute import selective_recompute


def through_hooks(net, given):
    """Bytes of each storage that hooks around the network get."""
    seen, held = {}, []

    def pack(value):
        seen[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        held.append(value)  # so that no other storage gets its address
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        net(*given)
    return sorted(seen.values())


def test_kept_bytes_are_the_sum_by_hand():
    net, given = Net(depth=1, lora=True), inputs()
    token = 4 * WIDTH * ROWS * TOKENS  # float32
    block_inputs = [token, 4 * WIDTH]
    attention = [token, 4 * HEADS * ROWS * TOKENS]  # output, log-sum-exp
    products = [3 * token, token, 4 * token, token]  # qkv, out, up, down
    for saved, kept in {"input": [], "attention": attention, "products": attention + products}.items():
        with selective_recompute(net, saved):
            assert through_hooks(net, given) == sorted(block_inputs + kept), saved


@pytest.mark.parametrize("saved", ["input", "attention", "products"])
def test_offloaded_products_come_back(saved):
    """Hooks that keep copies: nothing of the forward lives on, each comes back once, in a single further forward."""
    net, given = Net(lora=True), inputs()
    plain, calls, gone, copies = step(net, *given), Counter(), [], []

    def pack(value):
        calls["pack"] += 1
        gone.append(StorageWeakRef(value.untyped_storage()))
        return value.detach().numpy().copy()

    def unpack(array):
        calls["unpack"] += 1
        back = torch.from_numpy(array.copy())
        copies.append(StorageWeakRef(back.untyped_storage()))
        return back

    with selective_recompute(net, saved):
        forwards = count_calls(net)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = net(*given)
        assert {ref.cdata for ref in gone if not ref.expired()} == {x.untyped_storage()._cdata for x in given}
        (out * out.detach().cos()).sum().backward(retain_graph=True)
        assert copies and all(ref.expired() for ref in copies)
        assert forwards == {0: 2, 1: 2, 2: 2}
    assert calls["pack"] == calls["unpack"]
    assert same([out.detach(), given[0].grad, *gradients(net).values()], plain)


@pytest.mark.parametrize("fails", [False, True], ids=["steps", "failing steps"])
@pytest.mark.parametrize("saved", ["input", "products"])
def test_nothing_leaks(saved, fails):
    """Without the cycle collector: what is kept dies with the graph."""
    net, given = Net(depth=1, lora=True), inputs()
    broken = torch.zeros(1, 1, WIDTH + 1)
    counts = []
    gc.collect()
    gc.disable()
    try:
        with selective_recompute(net, saved):
            for i in range(50):
                if fails:
                    with pytest.raises(RuntimeError, match="must match"):
                        net(given[0], broken)
                step(net, *given)
                net(*given)  # a graph that is never differentiated
                if i in (1, 49):
                    counts.append(live_storages(collect=False))
    finally:
        gc.enable()
    assert counts[0] == counts[1]


def test_kept_products_are_free_once_their_block_is_done():
    net, given, kept, left = Net(depth=2), inputs(), [], []

    def pack(value):
        kept.extend([StorageWeakRef(value.untyped_storage())] if value.dim() == 2 else [])
        return value

    net.layers[1].register_forward_pre_hook(
        lambda block, args: (
            args[0].register_hook(lambda grad: left.append([not ref.expired() for ref in kept])) and None
        )
    )
    with selective_recompute(net, "products"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            out = net(*given)
        assert [not ref.expired() for ref in kept] == 8 * [True]
        out.sum().backward()
    assert left == [4 * [True] + 4 * [False]]
    assert all(ref.expired() for ref in kept)


@pytest.mark.parametrize("hooks", [False, True])
def test_graphs_side_by_side_and_twice(hooks):
    """Also with hooks that give back the very tensors they got."""
    net, given = Net(lora=True), [inputs() for _ in range(3)]
    plain = [step(net, *g) for g in given]
    around = torch.autograd.graph.saved_tensors_hooks(lambda v: v, lambda v: v) if hooks else nullcontext()
    with selective_recompute(net, "products"):
        with around:
            outs = [net(*g) for g in given]
        for i in (1, 0, 2):
            loss = (outs[i] * outs[i].detach().cos()).sum()
            loss.backward(retain_graph=True)
            first = [given[i][0].grad.clone(), *gradients(net).values()]
            given[i][0].grad = None
            loss.backward()
            second = [given[i][0].grad, *gradients(net).values()]
            assert same(first, plain[i][1:]) and same(second, plain[i][1:])


def test_a_forward_that_fails_offloads_nothing_more():
    net, given, packed = Net(depth=1), inputs(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(packed.append, lambda value: value)
    with selective_recompute(net), pytest.raises(RuntimeError, match="must match"), hooks:
        net(given[0], torch.zeros(1, 1, WIDTH + 1))
    assert [value.shape for value in packed] == [given[0].shape, (1, 1, WIDTH + 1)]


def test_second_derivatives():
    net, (x, scale) = Net(depth=2).double(), inputs()
    x = x.detach().double().requires_grad_()

    def penalty():
        (grad,) = torch.autograd.grad(net(x, scale.double()).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return [x.grad.clone(), *gradients(net).values()]

    # The fused CPU attention has no second derivative.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain, x.grad = penalty(), None
        with selective_recompute(net, "products"):
            assert same(penalty(), plain)
