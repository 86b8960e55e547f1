"""Deferred modulation and packed bases on a CUDA device: equal however late copies are, no sync, less memory."""

import pytest
import torch
from helpers.batches import gradients
from helpers.cuda_steps import delayed, lora_student_and_batch, time_ms
from helpers.family_batches import make_student
from helpers.tiny_pipelines import latent_shape
from torch import nn

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.memory import adamw_8bit, apply_memory, defer_modulation
from twinflow.memory.modulation.streamed_weights import StreamedWeights
from twinflow.memory.offload.host_pool import CudaTransfers
from twinflow.memory.quantised_linear import PackedWeight, dequantised

pytestmark = pytest.mark.gpu
FAMILIES = ("qwen_image", "sd3", "flux", "flux_guidance", "z_image")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def twice(student, batch, repeats=2, **options):
    """Gradients of the same step, the last of several."""
    criterion, teacher = TwinFlowLoss(TwinFlowConfig()), EMATeacher(student, 0.9, adapter=f"ema{len(options)}")
    draws = criterion.draw(batch[0], torch.Generator("cuda").manual_seed(0))
    for _ in range(repeats):
        gradients(student)
        criterion.backward(student, *batch, teacher=teacher, draws=draws, update_teacher=False)
    return gradients(student)


def close(found, expected, dtype):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].float() - value.float()).norm() / value.float().norm().clamp_min(1e-6)
        assert error <= TOLERANCE[dtype], (name, error.item())


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_same_however_late_copies_are(family, dtype, late, pinned, monkeypatch):
    student, batch = lora_student_and_batch(family, dtype)
    expected = twice(student, batch)
    if late:
        monkeypatch.setattr(CudaTransfers, "load", delayed(CudaTransfers.load, "_in"))
    with defer_modulation(student, pin_memory=pinned):
        close(twice(student, batch, other=1), expected, dtype)


@pytest.mark.parametrize("preset", ["40gb", "24gb"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_never_waits_for_the_device(family, preset):
    student, batch = lora_student_and_batch(family)
    criterion, teacher = TwinFlowLoss(TwinFlowConfig()), EMATeacher(student, 0.9)
    with apply_memory(student, preset):
        for _ in range(2):
            criterion.backward(student, *batch, teacher=teacher)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = criterion.backward(student, *batch, teacher=teacher)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_base_is_the_plain_one_with_its_weights(family):
    student, batch = lora_student_and_batch(family)
    apply_memory(student, "24gb")
    found = twice(student, batch)
    for parameter in student.parameters():
        if isinstance(parameter, PackedWeight):
            plain = dequantised(parameter)
            parameter.__class__ = nn.Parameter
            parameter.data = plain
    close(twice(student, batch, other=1), found, torch.bfloat16)


def test_the_weights_are_pinned_and_leave_the_card():
    layers = [nn.Linear(1024, 6144, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    nbytes = sum(p.numel() * 2 for layer in layers for p in layer.parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    weights = StreamedWeights(layers, torch.device("cuda", torch.cuda.current_device()))
    assert torch.cuda.memory_allocated() <= before - nbytes
    assert all(p.is_pinned() for layer in layers for p in layer.parameters())
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for _ in weights.sweep():
        pass
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() <= held + 2 * nbytes // 8 + 8192
    assert torch.cuda.memory_allocated() == held
    weights.bring_back()
    assert all(p.is_cuda for layer in layers for p in layer.parameters())


def test_a_model_on_the_host_moves_without_its_modulation():
    student = make_student("qwen_image", dtype=torch.bfloat16).requires_grad_(False)
    names = {f"{name}.{kind}" for name in student.modulation_layers() for kind in ("weight", "bias")}
    identities = {name: id(p) for name, p in student.network.named_parameters()}
    with defer_modulation(student, device="cuda"):
        assert all(p.is_cuda != (name in names) for name, p in student.network.named_parameters())
        assert {name: id(p) for name, p in student.network.named_parameters()} == identities
    assert all(p.is_cuda != (name in names) for name, p in student.network.named_parameters()), "where they came from"
    assert all(p.is_cuda for p in student.to("cuda").parameters())


def test_a_pass_that_ends_early_leaves_others_memory_alone(monkeypatch):
    layers = [nn.Linear(1024, 6144, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    weights = StreamedWeights(layers, torch.device("cuda", torch.cuda.current_device()))
    monkeypatch.setattr(CudaTransfers, "load", delayed(CudaTransfers.load, "_in"))
    for _ in weights.sweep():
        break
    others = [torch.zeros(1024 * 6144, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    torch.cuda.synchronize()
    assert not any(x.any() for x in others)


def test_a_teacher_made_meanwhile_goes_on_after_removal():
    student = make_student("qwen_image", "dual", torch.bfloat16).to("cuda")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("attn" in name or "_2." in name)
    handle = defer_modulation(student)
    teacher = EMATeacher(student, 0.9)
    x = torch.randn(latent_shape("qwen_image", 2), device="cuda", dtype=torch.bfloat16)
    cond = {"prompt_embeds": torch.randn(2, 7, student.condition_widths()["prompt_embeds"], device="cuda")}
    t = torch.tensor([0.2, 0.8], device="cuda")
    with torch.no_grad():
        before = teacher.module(x, t, t, cond)
        handle.remove()
        close({"v": teacher.module(x, t, t, cond)}, {"v": before}, torch.bfloat16)


def test_the_speed_of_a_pass():
    """Products hide behind the transfer: a pass takes about as long as copying its weights."""
    layers = [nn.Linear(3072, 18432, device="cuda", dtype=torch.bfloat16) for _ in range(16)]
    weights = StreamedWeights(layers, torch.device("cuda", torch.cuda.current_device()))
    rows = [torch.randn(1, 3072, device="cuda", dtype=torch.bfloat16) for _ in range(16)]
    target = torch.empty(weights.nbytes, dtype=torch.uint8, device="cuda")
    source = torch.empty(weights.nbytes, dtype=torch.uint8, pin_memory=True)

    def a_pass():
        for _, weight, bias in weights.sweep():
            for row in rows:
                nn.functional.linear(row, weight, bias)

    copying, passing = time_ms(lambda: target.copy_(source, non_blocking=True)), time_ms(a_pass)
    print(f"{weights.nbytes / 1e9:.2f} GB: copied in {copying:.1f} ms, passed in {passing:.1f} ms")
    assert passing <= 1.25 * copying


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_adamw_8bit(library):
    pytest.importorskip(library)
    parameter = nn.Parameter(torch.randn(64, 256, device="cuda"))
    optimizer = adamw_8bit([parameter], lr=1e-2, library=library)
    for _ in range(3):
        optimizer.zero_grad()
        parameter.square().sum().backward()
        before = parameter.detach().abs().mean()
        optimizer.step()
    assert parameter.detach().abs().mean() < before
