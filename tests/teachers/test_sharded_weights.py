"""Teachers of students that FSDP2 has sharded, on two gloo processes: those of the whole students."""

import copy

import pytest
import torch
from accelerate import Accelerator
from helpers.family_batches import make_batch, make_student, spread
from helpers.ranked_steps import on_two_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from twinflow import EMATeacher, FrozenTeacher, TwinFlowLoss
from twinflow.lora import add_lora
from twinflow.memory.blocks import repeated_blocks

T, R = torch.tensor([0.9, 0.31, 0.5, 1.0]), torch.tensor([0.2, 0.31, 0.0, 0.7])


def shard(student: nn.Module, **options) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for module in (*repeated_blocks(student).values(), student):
        fully_shard(module, mesh=mesh, **options)
    return student


def pair(lora: bool, dtype=torch.float32, **options) -> tuple[nn.Module, nn.Module]:
    """A whole student, and the same one sharded."""
    torch.manual_seed(0)
    whole = make_student("sd3", "dual+sign").to(dtype)  # FSDP wants one dtype of all that is trained
    whole = spread(add_lora(whole, 3) if lora else whole)  # rank 3: uneven shards
    return whole, shard(copy.deepcopy(whole), **options)


@torch.no_grad()
def move(students, seed: int) -> None:
    """Changes the trained weights of both alike."""
    for student in students:
        torch.manual_seed(seed)
        for parameter in student.parameters():
            if parameter.requires_grad:
                change = torch.randn(parameter.shape, dtype=parameter.dtype) / 10
                if isinstance(parameter, DTensor):
                    change = distribute_tensor(change, parameter.device_mesh, parameter.placements)
                parameter.add_(change)


def answers(teachers, batch, query="cfg") -> list[torch.Tensor]:
    with torch.no_grad():
        return [teacher.velocity(batch[0], T, R, batch[1], query=query) for teacher in teachers]


def averages(accelerator: Accelerator, lora: bool, dtype: torch.dtype) -> None:
    """An average moves, answers, is saved and loaded as that of a whole student; the student is as it was."""
    students = pair(lora, dtype)
    batch = make_batch("sd3", students[0], 4, dtype)
    names = [name for name, _ in students[1].named_parameters()]
    whole, mine = (EMATeacher(student, 0.9) for student in students)
    assert mine.adapter is None and names == [name for name, _ in students[1].named_parameters()]
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)
    for step in range(3):
        move(students, step)
        before = {name: p.to_local().clone() for name, p in students[1].named_parameters()}
        whole.update(), mine.update()
        torch.testing.assert_close(*answers((mine, whole), batch), **tolerance)
        assert all(torch.equal(p.to_local(), before[name]) for name, p in students[1].named_parameters())
    assert mine.parameters().keys() == whole.parameters().keys()
    for name, average in mine.parameters().items():
        assert isinstance(average, DTensor) and average.dtype == torch.float32
        assert average.to_local().shape == dict(students[1].named_parameters())[name].to_local().shape
        torch.testing.assert_close(average.full_tensor(), whole.parameters()[name], rtol=1e-6, atol=1e-7)
    state = mine.state_dict()
    expected = answers([mine], batch)[0]
    move(students[1:], 9), mine.update()
    assert not torch.equal(answers([mine], batch)[0], expected)
    mine.load_state_dict(state)
    assert torch.equal(answers([mine], batch)[0], expected) and mine.updates == 3
    with pytest.raises(ValueError, match="adapter must be None where the student is sharded, got 'two'"):
        EMATeacher(students[1], 0.9, adapter="two")
    with pytest.raises(ValueError, match=r"device must be None where the student is sharded, .* got meta"):
        EMATeacher(students[1], 0.9, device="meta")


def frozen(accelerator: Accelerator, lora: bool) -> None:
    """Fixed weights answer guidance, the student rollouts."""
    students = pair(lora)
    batch, teachers = make_batch("sd3", students[0], 4), [FrozenTeacher(student) for student in students]
    first = answers(teachers, batch)
    move(students, 1)
    for query in ("cfg", "rollout"):
        torch.testing.assert_close(*answers(teachers, batch, query), rtol=1e-4, atol=1e-5)
    assert torch.equal(answers(teachers, batch)[1], first[1])
    assert teachers[1].state_dict()["weights"].keys() <= teachers[0].state_dict()["weights"].keys()


def left_gathered(accelerator: Accelerator) -> None:
    """A root that stays gathered behind a call, as torch leaves it, is neither read nor taken for other parameters."""
    _, student = pair(lora=False, reshard_after_forward=None)
    batch = make_batch("sd3", student, 4)
    teacher, other = EMATeacher(student, 0.9), None
    move([student], 1)
    teacher.update()
    move([student], 2)
    with torch.no_grad():
        velocity = student(batch[0], T, R, batch[1])
    assert not all(isinstance(p, DTensor) for p in student.parameters())
    found = answers([teacher], batch)[0]
    assert not torch.allclose(found, velocity, rtol=1e-2)
    assert torch.equal(answers([teacher], batch)[0], found)
    with torch.no_grad():
        assert torch.equal(student(batch[0], T, R, batch[1]), velocity)
    teacher.check(student)
    with torch.no_grad():
        student(batch[0], T, R, batch[1])
    other = EMATeacher(student, 0.9)
    assert all(isinstance(value, DTensor) for value in other.parameters().values())
    with torch.no_grad():
        student(batch[0], T, R, batch[1])
    TwinFlowLoss()(student, *batch, teacher=teacher).loss.backward()


def between(accelerator: Accelerator) -> None:
    """A call of the teacher between the student's forward and its backward leaves the gradients as they are."""
    for lora in (True, False):
        _, student = pair(lora)
        batch, found = make_batch("sd3", student, 4), []
        teacher = EMATeacher(student, 0.9)
        move([student], 1)
        for called in (False, True):
            velocity = student(batch[0], T, R, batch[1])
            if called:
                answers([teacher], batch)
            (velocity * batch[0]).sum().backward()
            found.append({name: p.grad.to_local() for name, p in student.named_parameters() if p.requires_grad})
            student.zero_grad()
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def every_teacher(accelerator: Accelerator) -> None:
    for lora in (True, False):
        averages(accelerator, lora, torch.float32)
        frozen(accelerator, lora)
    averages(accelerator, False, torch.bfloat16)
    left_gathered(accelerator)
    between(accelerator)


def test_teachers_of_sharded_students():
    on_two_ranks("fsdp2", every_teacher)
