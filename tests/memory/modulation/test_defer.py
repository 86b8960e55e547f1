"""Deferred modulation: the bits of the model without it, two passes over the weights a step."""

import pytest
import torch
from helpers.deferred_cases import FAMILIES, assert_equal, count_sweeps, student_of, trained
from helpers.family_batches import make_batch, make_condition, make_student
from helpers.tiny_pipelines import latent_shape
from torch import nn

from twinflow import EMATeacher, FrozenTeacher, StudentTeacher, TwinFlowConfig
from twinflow.memory import selective_recompute
from twinflow.memory.modulation.defer import defer_modulation
from twinflow.memory.offload.activations import offload_activations

ALL_TERMS = TwinFlowConfig(recipe="all_terms")


CASES = [
    pytest.param(family, config, marks=pytest.mark.slow if config and family != "sd3" else [])
    for config in (None, ALL_TERMS) for family in FAMILIES
]  # fmt: skip


@pytest.mark.parametrize("family, config", CASES)
def test_five_steps_are_the_same_bits(family, config):
    rows = 4 if config is None else 2
    for dtype, micro_batch in ((torch.float32, 1), (torch.bfloat16, None)):
        plain = trained(student_of(family, dtype=dtype), 5, micro_batch, config, rows=rows)
        student = student_of(family, dtype=dtype)
        with defer_modulation(student):
            assert_equal(trained(student, 5, micro_batch, config, rows=rows), plain)


@pytest.mark.parametrize("micro_batch", [2, 3, None])
@pytest.mark.parametrize("mode", ["dual+sign", "midpoint+sign", "sign", "midpoint"])
def test_every_conditioning_and_piece(mode, micro_batch):
    plain = trained(student_of("qwen_image", mode), 2, micro_batch, rows=7)
    student = student_of("qwen_image", mode)
    with defer_modulation(student):
        assert_equal(trained(student, 2, micro_batch, rows=7), plain)


@pytest.mark.parametrize("family", ["qwen_image", "sd3", "flux", "z_image"])
def test_with_every_mechanism(family):
    plain = trained(student_of(family, "dual+sign"), 2)
    for level, first in (("input", True), ("attention", False), ("products", True), ("input", False)):
        student = student_of(family, "dual+sign")
        offload = offload_activations(budget_gb=0.02, min_bytes=64, in_flight_bytes=256)
        steps = [
            lambda s=student: defer_modulation(s),
            lambda s=student, level=level: selective_recompute(s, level),
            lambda s=student, offload=offload: offload.attach(s),
        ]
        handles = [attach() for attach in (steps if first else reversed(steps))]
        assert_equal(trained(student, 2), plain)
        assert offload.stats.tensors > 0 and offload.stats.pool_bytes == 0
        for handle in reversed(handles):
            handle.remove()
        assert not any("forward" in vars(m) or "_apply" in vars(m) for m in student.modules())


def attention_trained(family):
    """No adapter: the attention layers themselves are trained, so that a teacher is a copy of the module."""
    torch.manual_seed(0)
    student = make_student(family, "dual")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("attn" in name or "attention" in name or "_2." in name)
    return student


@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
@pytest.mark.parametrize("teacher", [StudentTeacher, FrozenTeacher, lambda student: EMATeacher(student, 0.9)])
def test_every_teacher(teacher, family):
    for make in (student_of, attention_trained):
        plain = trained(make(family), 2, 2, teacher=teacher)
        student = make(family)
        with defer_modulation(student):
            assert_equal(trained(student, 2, 2, teacher=teacher), plain)


def test_two_passes_a_step(monkeypatch):
    seen = count_sweeps(monkeypatch)
    for micro_batch in (1, 3, None):
        student = student_of("flux")
        defer_modulation(student)
        trained(student, 1, micro_batch, ALL_TERMS)
        assert seen == [False, True], micro_batch
        seen.clear()


def test_one_pass_where_nothing_upstream_is_trained(monkeypatch):
    seen = count_sweeps(monkeypatch)
    student = student_of("qwen_image", "midpoint", targets=("to_q", "to_v"))
    plain = trained(student_of("qwen_image", "midpoint", targets=("to_q", "to_v")), 1)
    defer_modulation(student)
    assert_equal(trained(student, 1), plain)
    assert seen == [False]


def test_the_condition_of_each_row_counts():
    """SD3's embedding has the pooled prompt in it, so that times alone would not do."""
    student = student_of("sd3")
    cond, other = make_condition(student, 2), make_condition(student, 2)
    other["prompt_embeds"] = cond["prompt_embeds"]
    x, t = torch.randn(latent_shape("sd3", 2)), torch.tensor([0.3, 0.7])
    with torch.no_grad(), defer_modulation(student):
        assert not torch.allclose(student(x, t, t, cond), student(x, t, t, other))


def test_weights_upstream_get_a_gradient_from_every_piece():
    """Of the time embedder: the sum over the pieces, not the last one's."""
    grads = []
    for rows in (1, None):
        student = student_of("qwen_image")
        defer_modulation(student)
        grads.append(trained(student, 1, rows)["grad transformer.time_text_embed_2.timestep_embedder.linear_2.weight"])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)
    assert grads[0].abs().max() > 0


def test_layers_are_those_that_read_the_embedding():
    """Every linear layer whose input is the embedding's width and depends on it alone: found by watching a call."""
    for family in FAMILIES:
        student = student_of(family)
        seen = set()
        layers = {m: n for n, m in student.network.named_modules() if isinstance(m, nn.Linear)}

        def watch(layer, args, output, seen=seen, layers=layers):
            if args[0].dim() == 2 and "embed" not in layers[layer] and "lora" not in layers[layer]:
                seen.add(layers[layer])

        hooks = [layer.register_forward_hook(watch) for layer in layers]
        x, cond, _ = make_batch(family, student, 3)
        with torch.no_grad():
            student(x, torch.ones(3), torch.zeros(3), cond)
        for hook in hooks:
            hook.remove()
        rows = {n for n in seen if (".attn" not in n and "refiner" not in n) or "modulation" in n}
        known = {n for n in student.modulation_layers() if not n.startswith("all_final_layer.") or n in seen}
        assert rows - {n for n in rows if "t_embedder" in n} == known, family
