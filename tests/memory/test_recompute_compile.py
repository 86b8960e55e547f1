"""Selective recomputation under torch.compile: one graph a class, the same gradients, products in no backward."""

from collections import Counter

import pytest
import torch
from helpers.batches import assert_close, assert_same, gradients
from helpers.recompute_cases import ATTENTION, Net, inputs
from helpers.recompute_families import step as family_step
from helpers.recompute_families import student_and_batch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

from twinflow.memory.blocks import repeated_blocks
from twinflow.memory.recompute import SAVED, selective_recompute

# Unlike in eager, `down` is not run for an output that nothing needs. Whether "input" runs attention again is torch's
# choice, as for its own checkpointing: the partitioner of 2.13 keeps it, that of 2.14 does not.
COMPILED_AGAIN = {"attention": (3, 4, 0), "products": (0, 4, 0), "all": (0, 0, 0)}
EAGER = "aot_eager_decomp_partition"  # the compiled graphs, each operation as in eager


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Backwards:
    """A backend that counts the operations of backward graphs."""

    def __init__(self):
        self.names = Counter()
        self.backend = aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=self._count,
            partition_fn=min_cut_rematerialization_partition,
        )  # fmt: skip

    def _count(self, graph, _):
        self.names.update(
            node.target.overloadpacket.__name__ for node in graph.graph.nodes if hasattr(node.target, "overloadpacket")
        )
        return make_boxed_func(graph)


def compiled_step(net, given, backend):
    """Loss and gradients, the blocks compiled one by one."""
    for block in net.layers:
        block.compile(fullgraph=True, backend=backend)
    return whole_step(net, given)


def whole_step(net, given):
    out = net(*given)
    loss = (out * out.detach().cos()).sum()
    loss.backward()
    given[0].grad = None
    return loss.detach(), gradients(net)


def again_in_backward(names: Counter, plain: Counter) -> tuple[int, int, int]:
    """Products with and without bias and attention that run in a backward graph for the second time."""
    more = names - plain
    return more["addmm"], more["mm"], more[ATTENTION]


def checkpointed_by_torch(net, given) -> Counter:
    """The operations of the backward graph under torch's own checkpointing."""
    torch._dynamo.reset()
    backwards = Backwards()
    (block,) = net.layers
    out = torch.compile(lambda *args: checkpoint(block, *args, use_reentrant=False), backend=backwards.backend)(*given)
    out.sum().backward()
    return backwards.names


@pytest.mark.parametrize("saved", SAVED)
def test_products_are_in_no_backward_graph(saved):
    given, found, steps = inputs(), [], []
    net = Net(depth=1, lora=True)
    for level in ("all", saved):
        torch._dynamo.reset()
        backwards = Backwards()
        with selective_recompute(net, level):
            steps.append(compiled_step(net, given, backwards.backend))
        found.append(backwards.names)
    again = again_in_backward(found[1], found[0])
    if saved == "input":
        assert again == again_in_backward(checkpointed_by_torch(net, given), found[0]) and again[:2] == (3, 4)
    else:
        assert again == COMPILED_AGAIN[saved]
    assert not counters["graph_break"]
    assert_same(steps[1], steps[0])


def test_blocks_of_a_class_share_their_graph():
    """As without; torch.compile gives up on the ninth compilation of one code object, so that none is used again."""
    net, given = Net(depth=8), inputs()
    plain = whole_step(net, given)
    for time in (1, 2, 3):
        with selective_recompute(net, 2 * SAVED):
            assert_close(compiled_step(net, given, EAGER), plain)
        assert counters["stats"]["unique_graphs"] == 4 * time
    assert not counters["graph_break"]


def test_attaching_to_a_compiled_block_and_removing_from_it():
    net, given = Net(depth=2), inputs()
    plain = compiled_step(net, given, EAGER)
    for saved in SAVED:
        with selective_recompute(net, saved):
            assert_same(whole_step(net, given), plain)
    assert counters["stats"]["unique_graphs"] == 1 + len(SAVED)
    assert_same(whole_step(net, given), plain)
    assert counters["stats"]["unique_graphs"] == 1 + len(SAVED)


def test_a_whole_network_in_one_graph():
    net, given = Net(depth=3, lora=True), inputs()
    plain = whole_step(net, given)
    with selective_recompute(net, ["input", "products", "attention"]):
        whole = torch.compile(net, fullgraph=True, backend=EAGER)
        out = whole(*given)
        loss = (out * out.detach().cos()).sum()
        loss.backward()
        assert_close((loss.detach(), gradients(net)), plain)
        with torch.no_grad():
            torch.testing.assert_close(whole(*given), out)
    assert not counters["graph_break"]


def test_the_models_own_checkpointing_is_refused():
    net, given = Net(depth=1), inputs()
    with selective_recompute(net):
        compiled_step(net, given, EAGER)
        net.gradient_checkpointing = True
        with pytest.raises(Exception, match=r"call disable_gradient_checkpointing\(\) first"):
            net(*given)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen_image", "sd3", "sana", "flux", "z_image", "unet"])
def test_families(family):
    """Equal to compiled without; from eager by rounding alone, as compiled without is."""
    student, batch = student_and_batch(family, lora=True)
    eager = family_step(student, batch)
    compile_blocks(student, EAGER)
    plain = family_step(student, batch)
    for saved in SAVED[:3]:
        with selective_recompute(student, saved):
            assert_same(family_step(student, batch), plain)
    for name, value in plain[1].items():
        torch.testing.assert_close(value, eager[1][name], rtol=1e-3, atol=1e-4)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_inductor():
    """Fused code rounds otherwise, so that gradients agree to rounding with compiled without."""
    net, given = Net(depth=1, lora=True), inputs()
    plain = compiled_step(net, given, "inductor")
    for saved in ("input", "products"):
        with selective_recompute(net, saved):
            assert_close(whole_step(net, given), plain)
    assert not counters["graph_break"]


def compile_blocks(student: nn.Module, backend: str) -> None:
    if getattr(student.network, "_repeated_blocks", None):
        student.network.compile_repeated_blocks(fullgraph=True, backend=backend)
        return
    for block in repeated_blocks(student).values():
        block.compile(fullgraph=True, backend=backend)
