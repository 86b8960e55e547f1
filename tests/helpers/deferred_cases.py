"""Steps of tiny students whose modulation is deferred, or not: everything that a step leaves."""

import torch
from helpers.family_batches import make_batch, make_student, randomised

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.lora import add_lora
from twinflow.memory.modulation.defer import defer_modulation
from twinflow.memory.modulation.streamed_weights import StreamedWeights

FAMILIES = ("qwen_image", "sd3", "flux", "flux_guidance", "z_image")


def student_of(family: str, conditioning: str = "dual", dtype=torch.float32, targets=None):
    """With a LoRA that does something, and conditioning as after training."""
    torch.manual_seed(0)
    student = add_lora(make_student(family, dtype=dtype), rank=2, conditioning=conditioning, targets=targets)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 4)
    return randomised(student)


def plain_and_deferred(*arguments, **options):
    """The same student twice, the second with its modulation deferred."""
    for deferred in (False, True):
        student = student_of(*arguments, **options)
        if deferred:
            defer_modulation(student)
        yield student


def grads(student) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def trained(student, steps=2, micro_batch=1, config=None, teacher=None, rows=4, batch=None) -> dict[str, torch.Tensor]:
    """Losses, the last step's gradients, and the weights and averages after it."""
    torch.manual_seed(1)
    teacher = EMATeacher(student, 0.9) if teacher is None else teacher(student)
    criterion = TwinFlowLoss(config or TwinFlowConfig())
    parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    generator = torch.Generator().manual_seed(2)
    batch = make_batch(student.family, student, rows, student.dtype) if batch is None else batch
    found = {}
    for step in range(steps):
        optimizer.zero_grad()
        more = dict(teacher=teacher, generator=generator)
        if micro_batch is None:
            out = criterion(student, *batch, **more)
            out.loss.backward()
        else:
            out = criterion.backward(student, *batch, micro_batch=micro_batch, **more)
        optimizer.step()
        found[f"loss {step}"] = out.loss.detach()
    found |= {f"grad {n}": p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    found |= {f"average {n}": p.clone() for n, p in getattr(teacher, "parameters", dict)().items()}
    return found | {n: p.detach().clone() for n, p in parameters.items()}


def backward_once(student, **options) -> None:
    torch.manual_seed(1)
    criterion = TwinFlowLoss(TwinFlowConfig(enhanced_ratio=0, estimate_order=0))
    criterion.backward(student, *make_batch(student.family, student, 2), **options)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different[:5]


def count_sweeps(monkeypatch) -> list[bool]:
    """Every pass over deferred weights from now on: whether it was the backward one."""
    seen: list[bool] = []
    sweep = StreamedWeights.sweep

    def counting(self, reverse=False):
        seen.append(reverse)
        return sweep(self, reverse)

    monkeypatch.setattr(StreamedWeights, "sweep", counting)
    return seen
