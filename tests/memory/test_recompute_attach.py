"""Attaching to blocks and removing from them, and what is refused."""

import copy
import functools

import pytest
import torch
from helpers.batches import gradients
from helpers.recompute_cases import MIXED, Block, Net, Operations, inputs, same, step
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from twinflow.memory.blocks import repeated_blocks
from twinflow.memory.recompute import selective_recompute


def test_without_gradient_the_forward_is_its_own():
    net, given = Net(), inputs()
    with selective_recompute(net), torch.no_grad():
        assert torch.equal(net(*given), Net.forward(net, *given))
        with Operations() as seen:
            net(*given)
    with torch.no_grad(), Operations() as plain:
        net(*given)
    assert seen.counts == plain.counts


def test_removal_is_exact_in_any_order():
    net = Net()
    before = [dict(vars(block)) for block in net.layers]
    first = selective_recompute(net, "input", blocks=["layers.0"])
    second = selective_recompute(net, "all", blocks=[net.layers[2], net.layers[1]])
    assert second.blocks == ("layers.2", "layers.1")
    with pytest.raises(ValueError, match=r"selective_recompute: blocks must be without it yet, got layers.0; remove"):
        selective_recompute(net)
    first.remove()
    first.remove()
    assert "forward" not in vars(net.layers[0]) and "forward" in vars(net.layers[1])
    with pytest.raises(RuntimeError, match="stop"), second:
        raise RuntimeError("stop")
    assert [dict(vars(block)) for block in net.layers] == before
    selective_recompute(net).remove()


def test_a_forward_that_was_there_before_or_came_later():
    net, given, calls = Net(depth=1), inputs(), []
    block, plain = net.layers[0], step(net, *given)

    def logged(forward, x, **more):
        calls.append(1)
        return forward(x, **more)

    block.forward = before = functools.partial(logged, block.forward)
    handle = selective_recompute(net)
    assert same(step(net, *given), plain) and len(calls) == 2
    block.forward = later = functools.partial(logged, block.forward)
    handle.remove()
    assert block.forward is later
    assert same(step(net, *given), plain) and len(calls) == 4
    block.forward = before
    selective_recompute(net).remove()
    assert block.forward is before


def test_blocks_of_a_subclass_are_found():
    """As sharding makes them."""
    net = Net()
    net.layers[1].__class__ = type("ShardedBlock", (Block,), {})
    assert list(repeated_blocks(net)) == ["layers.0", "layers.1", "layers.2"]


def test_a_deep_copy_computes_with_its_own_weights():
    net, given = Net(), inputs()
    with selective_recompute(net):
        copied = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(0.5)
        expected = Net()
        expected.load_state_dict(copied.state_dict())
        assert same(step(copied, *given), step(expected, *given))
        assert not any(gradient.any() for gradient in gradients(net).values())
    again = selective_recompute(copied, "input")
    assert same(step(copied, *given), step(expected, *given))
    again.remove()
    assert same(step(copied, *given), step(expected, *given))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize("saved, options, message", [
    ("half", {}, "selective_recompute: saved must be of input, attention, products, all, got 'half'"),
    (["all", 3, "all"], {}, "selective_recompute: saved must be of input, attention, products, all, got 3"),
    (["all"], {}, "selective_recompute: saved must be one level or 3, one a block, got 1"),
    ("all", {"blocks": []}, "selective_recompute: blocks must name one block or more, got none"),
    ("all", {"blocks": ["layers.7"]}, "blocks must be modules of the model or their names, got 'layers.7'"),
    ("all", {"blocks": [nn.Linear(2, 2)]}, "blocks must be modules of the model or their names, got another Linear"),
    ("all", {"blocks": ["layers.1", "layers.1.up"]}, "blocks must be apart from one another, got 'layers.1.up'"),
    ("all", {"blocks": ["layers.1", "layers.1"]}, "blocks must be apart from one another, got 'layers.1'"),
])  # fmt: skip
def test_errors(saved, options, message):
    net = Net()
    with pytest.raises(ValueError) as error:
        selective_recompute(net, saved, **options)
    assert message in str(error.value)
    assert not any("forward" in vars(module) for module in net.modules())


def test_no_blocks_says_what_there_is():
    with pytest.raises(ValueError, match=r"repeated_blocks: model must hold repeated blocks .*hold: Linear\)"):
        selective_recompute(Plain())
    plain = Plain()
    plain._no_split_modules = ["Bloc"]
    with pytest.raises(ValueError, match="got Plain with none of the Bloc that it names"):
        repeated_blocks(plain)


def test_other_checkpointing_is_refused():
    net, given = Net(), inputs()
    net.gradient_checkpointing = True
    with pytest.raises(ValueError, match=r"call disable_gradient_checkpointing\(\) first"):
        selective_recompute(net)
    net.gradient_checkpointing = False
    with selective_recompute(net, MIXED):
        net.gradient_checkpointing = True
        with pytest.raises(ValueError, match=r"call disable_gradient_checkpointing\(\) first"):
            net(*given)
        with torch.no_grad():
            net(*given)
        net.gradient_checkpointing = False
        net(*given)
    net.layers[1] = checkpoint_wrapper(net.layers[1])
    with pytest.raises(ValueError, match=r"got a CheckpointWrapper at layers\.1;"):
        selective_recompute(net)
