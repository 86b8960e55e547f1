"""Real transformer classes on a CUDA device: no host sync, equal bits, nothing as large as the base allocated."""

import pytest
import torch
from helpers.cuda_steps import lora_student_and_batch
from helpers.family_batches import FAMILIES
from helpers.tiny_pipelines import latent_shape, tiny_transformer

from twinflow import EMATeacher, FrozenTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.lora import add_lora
from twinflow.models import load

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("make", [lambda s: EMATeacher(s, 0.9), FrozenTeacher], ids=["ema", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_step_never_waits_for_the_device(family, make):
    student, batch = lora_student_and_batch(family)
    criterion, teacher = TwinFlowLoss(TwinFlowConfig()), make(student)
    for _ in range(2):  # compiles kernels, fills the transformers' caches
        criterion(student, *batch, teacher=teacher).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = criterion(student, *batch, teacher=teacher)
        out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_step_gives_equal_bits_twice(family):
    student, batch = lora_student_and_batch(family)
    criterion, teacher = TwinFlowLoss(TwinFlowConfig()), EMATeacher(student, 0.9)
    draws = criterion.draw(batch[0], torch.Generator("cuda").manual_seed(0))
    results = []
    for _ in range(2):
        student.zero_grad()
        out = criterion(student, *batch, teacher=teacher, draws=draws, update_teacher=False)
        out.loss.backward()
        results.append([out.loss.detach(), *(p.grad.clone() for p in student.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_lora_teacher_allocates_nothing_as_large_as_the_base():
    """A base of 100 MB in bf16: the second slot and the teacher's calls stay far below it."""
    network = tiny_transformer("sd3", num_layers=6, num_attention_heads=32, caption_projection_dim=512)
    student = add_lora(load(network.to("cuda", torch.bfloat16)), 4)
    base = sum(p.numel() * p.element_size() for p in student.parameters() if not p.requires_grad)
    batch = torch.randn(latent_shape("sd3", 1), device="cuda", dtype=torch.bfloat16)
    widths = student.condition_widths()
    cond = {
        name: torch.randn(1, *[7] * (name == "prompt_embeds"), width, device="cuda") for name, width in widths.items()
    }
    times = torch.full((1,), 0.5, device="cuda"), torch.zeros(1, device="cuda")
    with torch.no_grad():
        student(batch, *times, cond)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    teacher = EMATeacher(student, 0.9)
    teacher.update()
    teacher.velocity(batch, *times, cond, query="rollout")
    torch.cuda.synchronize()
    assert base > 5e7 and torch.cuda.max_memory_allocated() - before < base / 5
