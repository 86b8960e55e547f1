"""Presets that move or pack weights, on real tiny classes: what is put on, in which order, and what is left."""

import pytest
import torch
from helpers.deferred_cases import FAMILIES, assert_equal, student_of, trained
from helpers.family_batches import make_student
from safetensors.torch import load_file
from torch import nn

from twinflow.export import export
from twinflow.memory import PRESETS, MemoryPreset, apply_memory, quantise_base, quantised_form
from twinflow.memory.quantised_linear import PackedWeight, dequantised


def names_of(student, kind) -> set[str]:
    return {name for name, p in student.network.named_parameters() if isinstance(p, PackedWeight) is kind}


@pytest.mark.parametrize("family", FAMILIES)
def test_40gb_is_exact(family, caplog):
    caplog.set_level("INFO", "twinflow")
    plain = trained(student_of(family), 2)
    student = student_of(family)
    with apply_memory(student, "40gb") as applied:
        assert applied.micro_batch == 1 and student.deferral is not None
        assert_equal(trained(student, 2, applied.micro_batch), plain)
    assert student.deferral is None and not any("forward" in vars(m) for m in student.modules())
    said = [record.getMessage() for record in caplog.records if record.name.startswith("twinflow")]
    assert said[0].startswith("modulation deferred: ")
    assert said[1].startswith("memory preset 40gb: 1 row(s) at a time; blocks keep input; modulation weights in pinned")


@pytest.mark.parametrize("name", ["24gb", "16gb"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_presets_are_exact_but_for_the_packing(family, name):
    """The measure: a plain student whose frozen weights are those that the packed ones stand for."""
    student, plain = student_of(family), student_of(family)
    modulation = {f"{layer}.weight" for layer in student.modulation_layers()}
    applied = apply_memory(student, name)
    assert quantised_form(student) == "nf4" and not names_of(student, True) & modulation
    theirs = dict(plain.network.named_parameters())
    for parameter, packed in student.network.named_parameters():
        if isinstance(packed, PackedWeight):
            theirs[parameter].data = dequantised(packed)
    assert_equal(trained(student, 2, applied.micro_batch), trained(plain, 2))
    applied.remove()
    assert quantised_form(student) == "nf4" and student.deferral is None


def test_a_base_in_another_form_is_refused():
    student = student_of("sd3")
    quantise_base(student.network, "int8", skip=list(student.modulation_layers()))
    with pytest.raises(ValueError, match="base must be nf4 for preset '24gb', got one in int8"):
        apply_memory(student, "24gb")
    assert student.deferral is None and not any("forward" in vars(m) for m in student.modules())
    with apply_memory(student, MemoryPreset("mine", "input", 1, 0.0, True, "int8")):
        trained(student, 1)


def lora():
    return student_of("sd3")


def checkpointed():
    student = lora()
    student.network.enable_gradient_checkpointing()
    return student


@pytest.mark.parametrize("make, preset, options, parts", [
    (lora, "80", {}, "preset must be auto or 80gb"),
    (lora, "auto", {}, "memory_gb must be given where the student is on cpu, got None"),
    (lora, "80gb", {"batch": 4}, "batch must be left out where preset is not 'auto', got preset '80gb'"),
    (lora, "80gb", {"memory_gb": 4}, "memory_gb must be left out where preset is not 'auto'"),
    (lora, MemoryPreset("huge", "input", 1, 1e6), {}, "budget_gb must be at most the host memory available, "),
    (checkpointed, "80gb", {}, "must have its own gradient checkpointing off, got it on; call"),
    (lambda: nn.ModuleList([nn.Linear(2, 2)]), MemoryPreset("mine", defer=True), {},
     "student must be from twinflow.models.load for preset 'mine', got ModuleList"),
    (lambda: student_of("sana"), "40gb", {}, "modulation layers that read its time embedding, got sana without any"),
    (lambda: make_student("sd3", "dual"), "24gb", {}, "modulation must be frozen, got training of"),
])  # fmt: skip
def test_refusals_leave_nothing(make, preset, options, parts, caplog):
    caplog.set_level("INFO", "twinflow")
    student = make()
    with pytest.raises((ValueError, TypeError)) as error:
        apply_memory(student, preset, **options)
    assert parts in str(error.value)
    assert not any(record.name.startswith("twinflow") for record in caplog.records)
    assert not any("forward" in vars(m) for m in student.modules())
    assert quantised_form(student) is None


def test_adamw_is_what_the_preset_counts_on():
    parameters = [nn.Parameter(torch.randn(8192))]
    for name, preset in PRESETS.items():
        if name == "batch" or preset.defer:
            student = student_of("sd3")
            with apply_memory(student, name) as applied:
                optimizer = applied.adamw(parameters, lr=1e-2, weight_decay=0.0)
            parameters[0].grad = torch.ones(8192)
            optimizer.step()
            tensors = [v for v in optimizer.state[parameters[0]].values() if isinstance(v, torch.Tensor)]
            moments = {str(v.dtype) for v in tensors if v.numel() == 8192}
            assert moments == ({"torch.uint8"} if preset.optimizer else {"torch.float32"}), name
            assert optimizer.param_groups[0]["lr"] == 1e-2 and optimizer.param_groups[0]["weight_decay"] == 0.0


def test_export_of_a_packed_base(tmp_path):
    """A LoRA is the same file; a model that is trained without one would be written as codes."""
    for name in ("plain", "packed"):
        student = student_of("sd3")
        if name == "packed":
            apply_memory(student, "24gb")
        export(student, tmp_path / name)
    files = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("plain", "packed")]
    assert_equal(*files)
    student = make_student("sd3", "dual")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("ff" in name or "_2." in name)
    quantise_base(student)
    with pytest.raises(ValueError, match="must hold whole weights, got a base in nf4; train a LoRA, which is exported"):
        export(student, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_memory_where_the_model_is_on_the_cpu():
    for name in ("40gb", "checkpoint"):
        student = student_of("sd3")
        with apply_memory(student, name, device="cpu"):
            trained(student, 1)
