"""A quantised base: the bits of a plain one with the dequantised weights, under every mechanism of memory."""

from collections import Counter

import pytest
import torch
from helpers.deferred_cases import assert_equal, trained
from helpers.family_batches import make_batch, make_student
from helpers.memory_cases import FAMILIES, LEVELS, OFFLOAD, student_of
from helpers.quantised_cases import FORMS, TIMES, Q, linear, pair, partly_trained
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from twinflow.lora import add_lora
from twinflow.memory.offload.activations import offload_activations
from twinflow.memory.quantised_base import quantise_base, quantised_form
from twinflow.memory.quantised_linear import PackedWeight
from twinflow.memory.recompute import selective_recompute


def bf16_student(family: str):
    torch.manual_seed(0)
    return add_lora(make_student(family, dtype=torch.bfloat16), rank=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_five_steps_have_the_bits_of_the_dequantised_weights(family, form):
    quantised, plain, base = pair(lambda: student_of(family, True), form)
    assert quantised_form(quantised) == form and quantised_form(plain) is None
    assert str(base) == f"{form} base: {len(base.layers)} linear layers, 0.00 GB -> 0.00 GB"
    x, cond, _ = make_batch(family, quantised, 2)
    with torch.no_grad():
        assert torch.equal(quantised(x, *TIMES, cond), plain(x, *TIMES, cond))
    assert_equal(trained(quantised, 5, 1), trained(plain, 5, 1))


@pytest.mark.parametrize("family, form", [("qwen_image", "nf4"), ("z_image", "int8")])
def test_in_bf16(family, form):
    quantised, plain, base = pair(lambda: bf16_student(family), form)
    assert {linear(quantised, name).weight.packing.dtype for name in base.layers} == {torch.bfloat16}
    assert_equal(trained(quantised, 2, 1), trained(plain, 2, 1))


class Dequantised(TorchDispatchMode):
    """Dtypes of the weights that are made."""

    def __init__(self):
        super().__init__()
        self.dtypes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.twinflow.dequantise.default:
            self.dtypes[result.dtype] += 1
        return result


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast(form):
    quantised, plain, _ = pair(lambda: student_of("sd3", True), form)
    with torch.autocast("cpu", torch.bfloat16):
        with Dequantised() as made:
            mine = trained(quantised, 2, 1)
        assert_equal(mine, trained(plain, 2, 1))
    assert set(made.dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("form", FORMS)
def test_a_student_that_trains_other_layers(form):
    quantised, plain, base = pair(partly_trained, form)
    assert Q in base.layers and Q.replace("to_q", "to_k") not in base.layers
    assert_equal(trained(quantised, 2, 1), trained(plain, 2, 1))


@pytest.mark.parametrize("family, form, levels", [("qwen_image", "nf4", LEVELS), ("sana", "int8", ("products",))])
def test_recompute_and_offload(family, form, levels):
    plain = trained(pair(lambda: student_of(family, True), form)[1], 1, 1)
    for level in levels:
        student = student_of(family, True)
        quantise_base(student, form)
        offload = offload_activations(**OFFLOAD)
        handles = [selective_recompute(student, level), offload.attach(student)]
        assert_equal(trained(student, 1, 1), plain)
        assert offload.stats.tensors > 0
        for handle in handles:
            handle.remove()


class Saved:
    """Shapes and dtypes of what autograd saves beside parameters and their views, and the parameters among it."""

    def __init__(self, student, batch, level="all"):
        self.others, self.packed, self.step = Counter(), set(), 0
        with selective_recompute(student, level), torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x):
            self.out = student(batch[0], *TIMES, batch[1])

    def pack(self, tensor):
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, PackedWeight):
            self.packed.add(base.data_ptr())
        if not isinstance(base, nn.Parameter):
            self.others[tuple(tensor.shape), tensor.dtype] += 1
        return tensor


@pytest.mark.parametrize("level", ["all", "products", "input"])
@pytest.mark.parametrize("form", FORMS)
def test_the_packed_weight_alone_is_kept_for_backward(form, level):
    quantised, plain, _ = pair(lambda: student_of("qwen_image", True), form)
    batch = make_batch("qwen_image", plain, 2)
    kept = Saved(quantised, batch, level)
    assert kept.others == Saved(plain, batch, level).others
    assert kept.packed if level == "all" else not kept.packed


@pytest.mark.parametrize("level", ["all", pytest.param("products", marks=pytest.mark.slow)])
def test_compiled_blocks(level):
    """Graphs without breaks; each makes the weight for itself, and no whole one goes from forward to backward."""
    torch._dynamo.reset()
    quantised, plain, base = pair(lambda: student_of("qwen_image", True), "nf4")
    batch = make_batch("qwen_image", plain, 2)
    shapes = {tuple(linear(plain, name).weight.shape) for name in base.layers}
    shapes |= {shape[::-1] for shape in shapes}
    if level == "products":
        selective_recompute(quantised, level)
    quantised.network.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = quantised(batch[0], *TIMES, batch[1])
    kept = [x for x in saved if x._base is None and not isinstance(x, nn.Parameter) and x.is_floating_point()]
    assert kept and not [x.shape for x in kept if tuple(x.shape) in shapes]
    expected = plain(batch[0], *TIMES, batch[1])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)
    for student, result in ((quantised, out), (plain, expected)):
        student.zero_grad()
        result.square().sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in quantised.named_parameters():
        if theirs[name].grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=2e-4)
    torch._dynamo.reset()


def test_a_lora_added_afterwards():
    plain = pair(lambda: student_of("sd3", True), "nf4")[1]
    torch.manual_seed(0)
    student = make_student("sd3")
    student.transformer.requires_grad_(False)
    quantise_base(student, "nf4")
    student = add_lora(student, rank=2, conditioning="dual+sign")
    assert_equal(trained(student, 2, 1), trained(plain, 2, 1))
