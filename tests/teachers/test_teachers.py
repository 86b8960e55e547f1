"""The three teachers: what they hold, how they move, what they save."""

import pytest
import torch
from helpers.batches import COND, DIM, move, toy_batch, trained_pair
from helpers.toy import ToyNet
from torch import nn

from twinflow import EMATeacher, FrozenTeacher, StudentTeacher, TwinFlowConfig, TwinFlowLoss


def answers(teacher, query="rollout", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, DIM, generator=generator).to(dtype)
    cond = torch.randn(3, COND, generator=generator).to(dtype)
    times = torch.tensor([0.3, 0.6, 0.9]), torch.tensor([0.1, 0.2, 0.3])
    return teacher.velocity(x, *times, cond, query=query)


def test_decay_sequence():
    """d_0 = 0, d_{k+1} = d_k + (1 - d_k)(kappa - d_k) / 2; update k uses d_k."""
    net = ToyNet(dtype=torch.float64)
    teacher = EMATeacher(net, 0.99)
    decay, shadow = 0.0, None
    for k in range(20):
        move(net)
        teacher.update()
        source = net.first.weight.detach()
        shadow = source.clone() if shadow is None else decay * shadow + (1 - decay) * source
        torch.testing.assert_close(teacher.parameters()["first.weight"], shadow, rtol=1e-14, atol=1e-15)
        decay += (1 - decay) * (0.99 - decay) / 2
        assert teacher.current_decay == pytest.approx(decay, abs=1e-15)
        assert teacher.updates == k + 1
    assert 0.9 < decay < 0.93  # 0.9 is passed at the 17th update


def test_who_answers():
    """EMA: its own weights. Student: the student. Frozen: first weights for guidance, the student for rollouts."""
    net = ToyNet(DIM, COND)
    ema, student, frozen = EMATeacher(net, 0.9), StudentTeacher(net), FrozenTeacher(net)
    before = answers(student)
    move(net)
    after = answers(student)
    assert not torch.equal(before, after)
    for query in ("cfg", "rollout"):
        assert torch.equal(answers(ema, query), before)
        assert torch.equal(answers(student, query), after)
    assert torch.equal(answers(frozen, "cfg"), before)
    assert torch.equal(answers(frozen, "rollout"), after)
    for teacher in (student, frozen):
        teacher.update()
    assert torch.equal(answers(frozen, "cfg"), before)
    ema.update()
    assert torch.equal(answers(ema), after)
    for teacher in (ema, student, frozen):
        assert not answers(teacher).requires_grad
        with pytest.raises(ValueError, match="velocity: query must be cfg or rollout, got 'other'"):
            answers(teacher, "other")


def test_a_float32_average_of_bf16_weights_moves_where_bf16_stalls():
    net = ToyNet(dtype=torch.bfloat16)
    with torch.no_grad():
        net.first.weight.fill_(1.0)
    wide, narrow = EMATeacher(net, 0.999), EMATeacher(net, 0.999, dtype=torch.bfloat16)
    for teacher in (wide, narrow):
        teacher.update()
        teacher.current_decay = 0.999
    with torch.no_grad():
        net.first.weight.fill_(1.5)
    for _ in range(100):
        wide.update()
        narrow.update()
    wanted = 1.5 - 0.5 * torch.tensor(0.999).double().pow(100)
    assert wide.parameters()["first.weight"].dtype == torch.float32
    assert wide.parameters()["first.weight"].mean().item() == pytest.approx(wanted.item(), rel=1e-3)
    assert torch.equal(narrow.parameters()["first.weight"].float(), torch.ones_like(net.first.weight).float())
    assert answers(wide, dtype=torch.bfloat16).dtype == torch.bfloat16
    compute = dict(wide.module.named_parameters())["first.weight"]
    assert torch.equal(compute, wide.parameters()["first.weight"].to(torch.bfloat16))


@pytest.mark.parametrize("make", [lambda net: EMATeacher(net, 0.9), FrozenTeacher])
def test_frozen_parameters_are_shared(make):
    """A base model under an adapter is not copied."""
    net = ToyNet()
    net.first.requires_grad_(False)
    teacher = make(net)
    held = dict(teacher.module.named_parameters())
    assert held["first.weight"] is net.first.weight and held["first.bias"] is net.first.bias
    assert held["second.weight"].data_ptr() != net.second.weight.data_ptr()
    names = set(teacher.state_dict().get("shadow", teacher.state_dict().get("weights")))
    assert names == {"second.weight", "second.bias"}
    assert net.second.weight.requires_grad and not net.first.weight.requires_grad


class Convolutions(nn.Module):
    """A network with channels_last weights, a buffer and a tied parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.again.bias = self.conv.bias
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x, t, r, cond):
        return self.again(self.conv(x)) * self.scale


def test_channels_last_tied_parameters_and_buffers():
    net = Convolutions()
    teacher = EMATeacher(net, 0.9)
    expected = None
    for decay in (0.0, 0.45):
        move(net)
        net.scale += 1
        teacher.update()
        weight = net.conv.weight.detach()
        expected = weight.clone() if expected is None else decay * expected + (1 - decay) * weight
        torch.testing.assert_close(teacher.parameters()["conv.weight"], expected)
    held = teacher.module
    assert held.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert held.conv.bias is held.again.bias and set(teacher.parameters()) == {
        "conv.weight",
        "conv.bias",
        "again.weight",
    }
    assert held.scale == 3.0 and held.scale.data_ptr() != net.scale.data_ptr()


def test_dtype_and_device_of_the_average():
    net = ToyNet(dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        teacher = EMATeacher(net, 0.9, dtype=dtype, device="cpu")
        assert {p.dtype for p in teacher.parameters().values()} == {dtype}
        move(net)
        teacher.update()
        assert torch.equal(answers(teacher, dtype=torch.bfloat16), answers(StudentTeacher(net), dtype=torch.bfloat16))
    wide = EMATeacher(ToyNet(dtype=torch.float64), 0.9)
    assert {p.dtype for p in wide.parameters().values()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda net: EMATeacher(net, 0.9), FrozenTeacher, StudentTeacher])
def test_save_and_load(make, dtype):
    net = ToyNet(DIM, COND, dtype=dtype)
    teacher = make(net)
    for _ in range(3):
        move(net)
        teacher.update()
    saved = teacher.state_dict()
    expected = answers(teacher, "cfg", dtype)
    other = make(net)
    other.load_state_dict(saved)
    assert torch.equal(answers(other, "cfg", dtype), expected)
    move(net)
    for each in (teacher, other):
        each.update()
    assert torch.equal(answers(other, "cfg", dtype), answers(teacher, "cfg", dtype))
    again = make(net)  # the saved state is a copy: the updates above have not moved it
    again.load_state_dict(saved)
    if make is not StudentTeacher:
        assert torch.equal(answers(again, "cfg", dtype), expected)


@pytest.mark.parametrize("decay, instead", [(0, "StudentTeacher"), (1, "FrozenTeacher"), (0.0, "StudentTeacher")])
def test_a_degenerate_decay_names_the_right_class(decay, instead):
    with pytest.raises(ValueError, match=rf"EMATeacher: decay must be in \(0, 1\), got {decay}; use {instead}"):
        EMATeacher(ToyNet(), decay)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan"), "0.9", None, True])
def test_a_decay_out_of_range(decay):
    with pytest.raises((TypeError, ValueError), match="EMATeacher: decay must be"):
        EMATeacher(ToyNet(), decay)


def test_wrong_students():
    for make in (lambda net: EMATeacher(net, 0.9), FrozenTeacher):
        with pytest.raises(TypeError, match=r"Teacher: student must be an nn.Module, got function"):
            make(lambda x, t, r, cond: x)
        with pytest.raises(ValueError, match="Teacher: student must have a parameter that requires grad, got none"):
            make(ToyNet().requires_grad_(False))
    with pytest.raises(TypeError, match="StudentTeacher: student must be callable, got int"):
        StudentTeacher(3)
    net = ToyNet()
    net.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"EMATeacher: parameter phase must be floating, got torch.complex64"):
        EMATeacher(net, 0.9)
    with pytest.raises(TypeError, match=r"EMATeacher: dtype must be a floating dtype, got torch.int64"):
        EMATeacher(ToyNet(), 0.9, dtype=torch.int64)


@pytest.mark.parametrize("make", [lambda net: EMATeacher(net, 0.9), FrozenTeacher])
def test_a_state_that_does_not_match(make):
    teacher, other = make(ToyNet(5)), make(ToyNet(6))
    before = answers(teacher, "cfg")
    with pytest.raises(ValueError, match=r"first.weight must be of shape \(16, 10\), got \(16, 11\)"):
        teacher.load_state_dict(other.state_dict())
    fewer = teacher.state_dict()
    fewer["shadow" if "shadow" in fewer else "weights"].popitem()
    with pytest.raises(ValueError, match=r"state must have 4 tensors .* got a difference in \['second.bias'\]"):
        teacher.load_state_dict(fewer)
    assert torch.equal(answers(teacher, "cfg"), before)


@pytest.mark.parametrize("make", [lambda net: EMATeacher(net, 0.9), FrozenTeacher, StudentTeacher])
def test_a_teacher_of_another_student(make):
    student, _ = trained_pair("student")
    teacher = make(ToyNet(DIM, COND))
    before = answers(teacher, "cfg")
    with pytest.raises(ValueError, match="teacher must be made from the student it is used with, got a teacher of"):
        TwinFlowLoss(TwinFlowConfig())(student, *toy_batch(4), teacher=teacher)
    assert torch.equal(answers(teacher, "cfg"), before)


@pytest.mark.parametrize("make", [lambda net: EMATeacher(net, 0.9), FrozenTeacher])
def test_a_replaced_parameter(make):
    """The teacher would follow a tensor that nobody trains."""
    net = ToyNet(DIM, COND)
    teacher = make(net)
    net.second.bias = nn.Parameter(net.second.bias.detach().clone())
    with pytest.raises(ValueError, match=r"must be those the teacher was made from, got a difference in second.bias"):
        TwinFlowLoss(TwinFlowConfig())(net, *toy_batch(4), teacher=teacher)


def test_a_frozen_teacher_keeps_its_buffers():
    net = Convolutions()
    frozen = FrozenTeacher(net)
    net.scale += 1
    resumed = FrozenTeacher(net)
    resumed.load_state_dict(frozen.state_dict())
    assert resumed.module.scale == 1.0 and net.scale == 2.0


def test_the_teacher_follows_the_student_into_evaluation():
    """Dropout is active in the teacher where it is in the student, and only there."""
    net = ToyNet(DIM, COND, dropout=0.5)
    teacher = EMATeacher(net, 0.9)
    assert not torch.equal(answers(teacher), answers(teacher))
    net.eval()
    assert torch.equal(answers(teacher), answers(teacher))
