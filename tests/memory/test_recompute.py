"""What blocks run a second time, at every level: gradients bit for bit, operations counted by hand."""

import pytest
import torch
from helpers.batches import gradients
from helpers.recompute_cases import AGAIN, ATTENTION, MIXED, WIDTH, Net, backward_names, count_calls, inputs, same, step
from torch import nn

from twinflow.memory.recompute import SAVED, selective_recompute
from twinflow.memory.saved_products import keeps

aten = torch.ops.aten


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("saved", [*SAVED, MIXED], ids=str)
def test_gradients_are_those_of_plain_autograd(saved, lora):
    net, given = Net(lora=lora), inputs()
    plain = step(net, *given)
    with selective_recompute(net, saved) as handle:
        assert handle.blocks == ("layers.0", "layers.1", "layers.2")
        assert handle.saved == ((saved,) * 3 if isinstance(saved, str) else saved)
        assert same(step(net, *given), plain)
    assert same(step(net, *given), plain)


@pytest.mark.parametrize("saved", SAVED)
def test_what_runs_again(saved):
    net, given = Net(depth=1, lora=True), inputs()
    plain = backward_names(net, *given)
    calls = count_calls(net)
    with selective_recompute(net, saved):
        again = backward_names(net, *given) - plain
    assert (again["addmm"], again["mm"], again[ATTENTION]) == AGAIN[saved]
    assert calls == {0: 1 if saved == "all" else 2}


def conv(out, into, groups=1):
    return torch.randn(1, into * groups, 4, 4), torch.randn(out, into, 1, 1), None, [1, 1], [0, 0], [1, 1], False, [
        0, 0
    ], groups  # fmt: skip


M = torch.zeros


@pytest.mark.parametrize("op, args, kept", [
    (aten.mm, (M(1, 64), M(64, 32)), True),  # one row of a modulation is a base product too
    (aten.mm, (M(50, 64), M(64, 4)), False),
    (aten.mm, (M(50, 4), M(4, 64)), False),
    (aten.addmm, (M(64), M(50, 4), M(4, 64)), False),
    (aten.addmm, (M(64), M(2, 16), M(16, 64)), True),
    (aten.convolution, conv(16, 8), True),
    (aten.convolution, conv(4, 16), False),
    (aten.convolution, conv(16, 4), False),
    (aten.convolution, conv(16, 1, 16), True),  # depthwise
    (aten.bmm, (M(2, 3, 3), M(2, 3, 3)), True),
    (aten._int_mm, (M(2, 3), M(3, 3)), True),
    (aten._scaled_mm, (M(2, 3), M(3, 3)), True),
    (aten._weight_int8pack_mm, (M(2, 3), M(3, 3), M(3)), True),
    (aten.mv, (M(3, 3), M(3)), True),
    (aten.mul, (M(3), M(3)), False),
])  # fmt: skip
def test_products_of_adapters_are_told_by_their_rank(op, args, kept):
    assert keeps("products", 4, op.default if op is not aten.mul else op.Tensor, args) == kept


@pytest.mark.parametrize("name", [
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable", ATTENTION,
])  # fmt: skip
def test_attention_is_known_on_every_device(name):
    assert keeps("attention", 4, getattr(aten, name).default, ())
    assert not keeps("attention", 4, getattr(aten, f"{name}_backward").default, ())
    assert not keeps("attention", 0, aten.mm.default, (M(9, 9), M(9, 9)))


class InPlace(nn.Module):
    """Products that are changed in place, one through a view."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return (self.second(self.first(x).relu_()).transpose(0, 1).sigmoid_() * x.transpose(0, 1)).exp()


def test_products_that_are_changed_in_place():
    net, x = InPlace(), torch.randn(5, 3, WIDTH, requires_grad=True)

    def twice():
        loss = net(x).sum()
        for _ in range(2):
            loss.backward(retain_graph=True)
        found = [x.grad.clone(), *gradients(net).values()]
        x.grad = None
        return found

    plain, plain_ops = twice(), backward_names(net, x)
    x.grad = None
    gradients(net)
    with selective_recompute(net, blocks=[""]):
        assert same(twice(), plain)
        again = backward_names(net, x) - plain_ops
    assert not any(again[name] for name in ("mm", "addmm", "bmm"))


def test_a_product_changed_in_place_behind_its_block_is_refused():
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    with selective_recompute(net, blocks=["0"]):
        out = net(torch.randn(2, WIDTH).requires_grad_().exp()).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.exp().sum().backward()


def test_another_path_in_backward_is_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow, self.turn = nn.Linear(4, 6), nn.Linear(4, 4), 0

        def forward(self, x):
            self.turn += 1
            return (self.wide if self.turn % 2 else self.narrow)(x.sin()).sin().sum()

    net = Fickle()
    with selective_recompute(net, blocks=[""]):
        out = net(torch.randn(2, 4, requires_grad=True))
        wanted = r"aten.addmm.default of \(6,\) and \(2, 4\) and \(4, 6\), got aten.addmm.default of \(4,\) and"
        with pytest.raises(RuntimeError, match=f"selective_recompute: .* must run in backward .*, {wanted}"):
            out.backward()


@pytest.mark.parametrize("saved", SAVED)
def test_active_dropout_draws_the_same(saved):
    net, given = Net(dropout=0.5, lora=True), inputs()

    def seeded():
        torch.manual_seed(3)
        return [*step(net, *given), torch.get_rng_state()]

    plain = seeded()
    with selective_recompute(net, saved):
        assert same(seeded(), plain)


@pytest.mark.parametrize("saved", SAVED)
def test_meta(saved):
    """A forecast runs without data: the same operations again as on a device."""
    net, given = Net(dropout=0.5, lora=True).to("meta"), inputs("meta")
    plain = backward_names(net, *given)
    with selective_recompute(net, saved):
        again = backward_names(net, *given) - plain
    assert again["addmm"] == 3 * AGAIN[saved][0]
    assert again["mm"] == 3 * AGAIN[saved][1]
