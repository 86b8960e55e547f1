"""Mechanisms of memory together: the same gradients and weights as without any, and nothing left behind."""

import gc

import pytest
import torch
from helpers.deferred_cases import assert_equal, trained
from helpers.family_batches import make_batch
from helpers.memory_cases import FAMILIES, LEVELS, OFFLOAD, fail_once, live_storages, student_of

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.memory import PRESETS, MemoryPreset, apply_memory, defer_modulation, quantise_base, selective_recompute
from twinflow.memory.apply import AppliedMemory
from twinflow.memory.offload.activations import offload_activations


@pytest.mark.parametrize(
    "family, lora",
    [
        pytest.param(family, lora, id=f"{family}-{'lora' if lora else 'full'}", marks=[] if quick else pytest.mark.slow)
        for family in FAMILIES
        for lora, quick in ((True, True), (False, family == "sd3"))
    ],
)
def test_offload_and_recompute_row_by_row(family, lora):
    plain = trained(student_of(family, lora), 3, 1)
    for level in LEVELS:
        student = student_of(family, lora)
        offload = offload_activations(**OFFLOAD)
        handles = [selective_recompute(student, level), offload.attach(student)]
        assert_equal(trained(student, 3, 1), plain)
        assert offload.stats.tensors > 0 and offload.stats.pool_bytes == 0, level
        for handle in handles:
            handle.remove()


def test_the_other_order_and_the_other_recipe():
    config = TwinFlowConfig(recipe="all_terms")
    plain = trained(student_of("sd3", True), 2, None, config)
    student = student_of("sd3", True)
    handles = [offload_activations(**OFFLOAD).attach(student), selective_recompute(student, "products")]
    assert_equal(trained(student, 2, None, config), plain)
    for handle in handles:
        handle.remove()
    assert "forward" not in vars(student) and not any("forward" in vars(m) for m in student.modules())


def test_levels_mixed_by_block():
    plain = trained(student_of("flux", True), 2, 1)
    student = student_of("flux", True)
    names = selective_recompute(student, "all")
    names.remove()
    levels = tuple(LEVELS[i % len(LEVELS)] for i in range(len(names.blocks)))
    with apply_memory(student, MemoryPreset("mixed", levels, 1, 0.05)) as applied:
        assert applied.micro_batch == 1
        assert_equal(trained(student, 2, 1), plain)


@pytest.mark.parametrize("level", [pytest.param(level, marks=pytest.mark.slow) for level in ("products", "input")])
def test_compiled_blocks_with_everything(level):
    """Regional compilation: bits differ from eager, so the compiled model without mechanisms is the measure."""
    results = []
    for mechanisms in (False, True):
        torch._dynamo.reset()
        student = student_of("qwen_image", True)
        if mechanisms:
            selective_recompute(student, level)
            offload_activations(**OFFLOAD).attach(student)
        student.network.compile_repeated_blocks(backend="aot_eager")
        results.append(trained(student, 1, 1))
    plain, both = results
    assert plain.keys() == both.keys()
    for name, value in plain.items():
        torch.testing.assert_close(
            both[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_fifty_steps_leave_what_two_leave():
    """Of all mechanisms at once, by either way to differentiate."""
    student = student_of("qwen_image", True)
    quantise_base(student.network, "nf4", skip=student.modulation_layers())
    teacher, criterion = EMATeacher(student, 0.9), TwinFlowLoss()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad])
    batch, counts = make_batch("qwen_image", student, 2), {}
    with defer_modulation(student), selective_recompute(student, "products"):
        handle = offload_activations(**OFFLOAD).attach(student)
        for step in range(50):
            if step % 2:
                criterion.backward(student, *batch, teacher=teacher)
            else:
                criterion(student, *batch, teacher=teacher).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in (1, 49):
                counts[step] = live_storages()
        handle.remove()
    assert counts[49] <= counts[1]  # less where other tests' garbage goes


def test_an_exception_in_the_middle_leaves_the_model_usable():
    plain = trained(student_of("qwen_image", True), 2, 1)
    student = student_of("qwen_image", True)
    offload = offload_activations(**OFFLOAD)
    handles = [selective_recompute(student, "products"), offload.attach(student)]
    block = list(student.network.transformer_blocks)[-1]
    for when in ("forward", "backward"):
        breaking = block.attn.to_out[0].register_forward_hook(fail_once(when))
        with pytest.raises(RuntimeError, match="broken"):
            trained_once(student)
        breaking.remove()
        student.zero_grad()
    gc.collect()
    assert offload.stats.pool_bytes == 0
    for name, parameter in student_of("qwen_image", True).named_parameters():
        assert torch.equal(dict(student.named_parameters())[name], parameter)
    assert_equal(trained(student, 2, 1), plain)
    for handle in handles:
        handle.remove()


def trained_once(student) -> None:
    batch = make_batch("qwen_image", student, 2)
    criterion = TwinFlowLoss(TwinFlowConfig(enhanced_ratio=0, estimate_order=0))
    criterion.backward(student, *batch)


def test_presets_are_applied_by_name(caplog):
    caplog.set_level("INFO", "twinflow")
    student = student_of("sd3", True)
    applied = apply_memory(student, "80gb")
    assert caplog.messages[-1:] == ["memory preset 80gb: 1 row(s) at a time; blocks keep products"]
    assert isinstance(applied, AppliedMemory) and applied.preset is PRESETS["80gb"]
    with pytest.raises(ValueError, match="blocks must be without it yet"):
        apply_memory(student, "checkpoint")
    applied.remove()
    apply_memory(student, "checkpoint-offload").remove()
    assert "forward" not in vars(student)


def test_auto_asks_the_planner():
    student = student_of("sd3", True).to(torch.bfloat16)
    settings = dict(resolution=256, batch=2, text_tokens=8)
    with apply_memory(student, "auto", memory_gb=1.0, **settings) as applied:
        assert applied.preset.name == "batch" and applied.micro_batch is None
