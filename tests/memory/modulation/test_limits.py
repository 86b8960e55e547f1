"""Deferred modulation: what it leaves behind, what it saves, how large it is."""

import copy
import gc

import pytest
import torch
from helpers.deferred_cases import FAMILIES, assert_equal, backward_once, student_of, trained
from helpers.family_batches import make_batch, make_student
from helpers.memory_cases import fail_once
from safetensors.torch import load_file

from twinflow import EMATeacher, TwinFlowLoss
from twinflow.export import export
from twinflow.memory.modulation.defer import defer_modulation
from twinflow.models import load


@pytest.mark.parametrize("when", ["forward", "backward", "rehearsal"])
def test_an_exception_in_the_middle_leaves_the_model_usable(when):
    plain = trained(student_of("qwen_image"), 2)
    student = student_of("qwen_image")
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    with defer_modulation(student):
        if when == "rehearsal":
            embedder = student.network.time_text_embed.timestep_embedder
            breaking = embedder.register_forward_pre_hook(lambda *_: 1 / 0)
        elif when == "forward":
            breaking = student.network.transformer_blocks[1].register_forward_hook(fail_once("forward"))
        else:
            breaking = student.network.transformer_blocks[1].register_full_backward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            backward_once(student)
        breaking.remove()
        student.zero_grad()
        assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
        assert_equal(trained(student, 2), plain)


def test_removing_leaves_the_model_as_it_was():
    student = student_of("flux")
    kept = {name: (id(p), p.data_ptr()) for name, p in student.named_parameters()}
    hooks = len(student.network.time_text_embed._forward_hooks)
    deferred = defer_modulation(student)
    deferred.remove()
    deferred.remove()
    assert {name: (id(p), p.data_ptr()) for name, p in student.named_parameters()} == kept
    assert len(student.network.time_text_embed._forward_hooks) == hooks and student.deferral is None
    assert not any("forward" in vars(m) or "_apply" in vars(m) for m in student.modules())
    student.to(torch.float64)
    defer_modulation(student)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_the_same_file(family, tmp_path):
    for name in ("plain", "deferred"):
        student = student_of(family, "dual+sign")
        if name == "deferred":
            defer_modulation(student)
        trained(student, 1)
        export(student, tmp_path / name)
        whole = make_student(family)
        if name == "deferred":
            defer_modulation(whole.requires_grad_(False))
        whole.network.save_pretrained(tmp_path / name / "whole")
    written = sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*.safetensors"))
    assert len(written) >= 2
    for path in written:
        saved = [load_file(tmp_path / name / path) for name in ("plain", "deferred")]
        assert saved[0].keys() == saved[1].keys() and len(saved[0])
        if path.parts[0] != "whole":  # the untrained models differ by their seed
            assert_equal(*saved)


def test_the_state_dict_is_the_models_own():
    student = student_of("z_image")
    plain = {name: value.clone() for name, value in student.state_dict().items()}
    with defer_modulation(student):
        assert_equal(dict(student.state_dict()), plain)
        student.load_state_dict({name: value + 1 for name, value in plain.items()})
    assert torch.equal(student.network.layers[0].adaLN_modulation[0].weight,
                       plain["transformer.layers.0.adaLN_modulation.0.weight"] + 1)  # fmt: skip


def test_ddp_passes_over_the_weights():
    """They are on another device than the rest, which its wrapper would refuse."""
    student = student_of("sd3")
    names = {
        n for n in dict(student.named_parameters()) if "norm1.linear" in n or "norm1_context" in n or "norm_out" in n
    }
    with defer_modulation(student):
        assert set(student._ddp_params_and_buffers_to_ignore) == names and len(names) == 10
    assert not hasattr(student, "_ddp_params_and_buffers_to_ignore")


def test_sizes_are_those_of_qwen_image():
    """13.6 GB in host memory, 4.4 MB a row: two six-fold layers of each of 60 blocks, and the last norm's."""
    import diffusers

    with torch.device("meta"):
        network = diffusers.QwenImageTransformer2DModel().to(torch.bfloat16).requires_grad_(False)
    deferred = defer_modulation(load(network))
    assert deferred.host_bytes == 2 * (120 * 6 + 2) * 3072 * (3072 + 1) == 13_631_729_664
    assert deferred.row_bytes == 2 * (120 * 6 + 2) * 3072 == 4_435_968
    assert str(deferred) == "modulation deferred: 121 layers, 13.63 GB in host memory, 4.44 MB a row on meta"


def test_a_copy_is_moved_itself_and_outlives_the_deferral():
    student = student_of("sd3")
    deferred = defer_modulation(student)
    other = copy.deepcopy(student)
    assert other.to("cpu") is other and other.network.float() is other.network
    x, cond, _ = make_batch("sd3", student, 2)
    t = torch.tensor([0.2, 0.8])
    with torch.no_grad():
        expected = student(x, t, t, cond)
        deferred.remove()
        assert torch.equal(other(x, t, t, cond), expected) and torch.equal(student(x, t, t, cond), expected)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
        assert torch.equal(other(x, t, t, cond), expected), "it has weights of its own"
    assert other.to(torch.float64).dtype is torch.float64


def test_a_teacher_made_meanwhile_goes_on_after_removal():
    results = []
    for removed in (False, True):
        student = make_student("qwen_image", "dual")
        for name, parameter in student.named_parameters():
            parameter.requires_grad_("attn" in name or "_2." in name)
        handle = defer_modulation(student)
        torch.manual_seed(1)
        teacher, batch = EMATeacher(student, 0.9), make_batch("qwen_image", student, 4)
        if removed:
            handle.remove()
        TwinFlowLoss().backward(student, *batch, teacher=teacher, generator=torch.Generator().manual_seed(2))
        results.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert_equal(*results)


def test_a_copy_of_the_model_shares_the_weights():
    student = student_of("sd3")
    deferred = defer_modulation(student)
    frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
    other = copy.deepcopy(student, memo=dict(frozen))
    assert other.deferral is deferred
    assert other.network.norm_out.linear.weight is student.network.norm_out.linear.weight
    x, cond, _ = make_batch("sd3", student, 2)
    t = torch.tensor([0.2, 0.8])
    with torch.no_grad():
        assert torch.equal(other(x, t, t, cond), student(x, t, t, cond))
    del other
    gc.collect()
