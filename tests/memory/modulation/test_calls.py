"""Deferred modulation beside what callers do: compiling, autocast, sampling, graphs that are kept."""

import pytest
import torch
from helpers.deferred_cases import FAMILIES, assert_equal, count_sweeps, grads, plain_and_deferred, student_of, trained
from helpers.family_batches import make_batch
from helpers.tiny_pipelines import latent_shape

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.memory import selective_recompute
from twinflow.memory.modulation.defer import defer_modulation
from twinflow.sampling import sample

ALL_TERMS = TwinFlowConfig(recipe="all_terms")


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_of_a_float32_base(backward_inside):
    results = []
    for student in plain_and_deferred("sd3", "dual+sign"):
        torch.manual_seed(1)
        batch, teacher = make_batch("sd3", student, 4), EMATeacher(student, 0.9)
        draws = TwinFlowLoss().draw(batch[0], torch.Generator().manual_seed(2))
        with torch.autocast("cpu", torch.bfloat16):
            loss = TwinFlowLoss()(student, *batch, teacher=teacher, draws=draws).loss
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        results.append(grads(student))
    assert_equal(*results)


@pytest.mark.slow
def test_the_whole_model_compiled():
    results = []
    for student in plain_and_deferred("qwen_image", "dual+sign"):
        torch._dynamo.reset()
        compiled = torch.compile(student, backend="eager")
        torch.manual_seed(1)
        batch, teacher = make_batch("qwen_image", student, 2), EMATeacher(compiled, 0.9)
        draws = TwinFlowLoss().draw(batch[0], torch.Generator().manual_seed(2))
        TwinFlowLoss().backward(compiled, *batch, teacher=teacher, draws=draws)
        results.append(grads(student))
    torch._dynamo.reset()
    assert_equal(*results)


def test_prompts_of_several_lengths():
    """A call is made in parts then, each with vectors of its own."""
    results = []
    for student in plain_and_deferred("qwen_image"):
        torch.manual_seed(3)
        x, cond, uncond = make_batch("qwen_image", student, 4)
        cond["prompt_lengths"] = torch.tensor([3, 7, 3, 5])
        uncond["prompt_lengths"] = torch.full((4,), 2)
        results.append(trained(student, 2, None, batch=(x, cond, uncond)))
    assert_equal(*results)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks(backend):
    """The compiled model without deferring is the measure: its bits differ from eager's."""
    results, graphs = [], []
    for student in plain_and_deferred("qwen_image", "dual+sign"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        selective_recompute(student, "input")
        student.network.compile_repeated_blocks(backend=backend, fullgraph=True)
        results.append(trained(student, 1))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] == graphs[1] > 0  # one for all blocks: where a layer's vectors stand is data
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=2e-5, msg=lambda t, n=name: f"{n}: {t}")


def test_gradients_add_to_those_that_are_there():
    """Parts of an optimizer step: the second adds to the first's, in rounding of float32."""
    results = []
    for student in plain_and_deferred("sd3"):
        torch.manual_seed(4)
        batches = [make_batch("sd3", student, 4) for _ in range(2)]
        criterion, teacher = TwinFlowLoss(), EMATeacher(student, 0.9)
        generator = torch.Generator().manual_seed(5)
        for batch in batches:
            criterion.backward(student, *batch, teacher=teacher, generator=generator, step_rows=8)
        results.append(grads(student))
    assert_equal(*results)


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_of_a_step(family, monkeypatch):
    """Sampling, evaluation and a user's own call."""
    results = []
    seen = count_sweeps(monkeypatch)
    for student in plain_and_deferred(family):
        torch.manual_seed(6)
        x, cond, uncond = make_batch(family, student, 3)
        t, r = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.2, 0.5, 0.0])
        student(x, t, r, cond).square().mean().backward()
        found = grads(student)
        z = torch.randn(latent_shape(family, 3))
        found["sample"] = sample(student, z, cond, steps=2)
        evaluated = TwinFlowLoss(TwinFlowConfig(enhanced_ratio=0, estimate_order=0))
        found["evaluation"] = evaluated.evaluate(
            student, x, cond, uncond, generator=torch.Generator().manual_seed(7)
        ).loss
        results.append(found)
    assert_equal(*results)
    assert seen == [False, True, False, False, False]


def test_a_graph_that_outlives_its_step_and_is_used_twice():
    results = []
    for student in plain_and_deferred("qwen_image"):
        torch.manual_seed(8)
        batch, criterion = make_batch("qwen_image", student, 4), TwinFlowLoss()
        teacher, generator = EMATeacher(student, 0.9), torch.Generator().manual_seed(9)
        first = criterion(student, *batch, teacher=teacher, generator=generator).loss
        second = criterion(student, *batch, teacher=teacher, generator=generator).loss
        parameters = [p for p in student.parameters() if p.requires_grad]
        found = torch.autograd.grad(second, parameters, retain_graph=True, allow_unused=True)
        found += torch.autograd.grad(second, parameters, allow_unused=True)
        found += torch.autograd.grad(first, parameters, allow_unused=True)
        results.append({str(i): g for i, g in enumerate(found) if g is not None})
    assert_equal(*results)


@pytest.mark.parametrize("how", ["one graph", "pieces kept for later"])
def test_pieces_that_are_differentiated_together(how):
    """Random states by row make pieces of single rows also where the graph is one; or a caller keeps their losses."""
    results = []
    for student in plain_and_deferred("qwen_image"):
        torch.manual_seed(1)
        batch, teacher = make_batch("qwen_image", student, 4), EMATeacher(student, 0.9)
        criterion, kept = TwinFlowLoss(TwinFlowConfig(rng_align="rows")), []
        more = dict(teacher=teacher, generator=torch.Generator().manual_seed(2))
        if how == "one graph":
            kept.append(criterion(student, *batch, **more).loss)
        else:
            criterion.backward(student, *batch, backward=kept.append, **more)
        parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
        if how == "one graph":
            found = torch.autograd.grad(kept[0], list(parameters.values()), allow_unused=True)
        else:
            sum(kept).backward()
            found = [p.grad for p in parameters.values()]
        results.append({n: g for n, g in zip(parameters, found, strict=True) if g is not None})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}")


def by_micro_batch(student, backward):
    """Gradients of a step of four pieces, whose losses a caller differentiates as it likes."""
    torch.manual_seed(1)
    batch, teacher = make_batch("qwen_image", student, 4), EMATeacher(student, 0.9)
    TwinFlowLoss().backward(
        student, *batch, backward=backward, teacher=teacher, generator=torch.Generator().manual_seed(2)
    )
    return grads(student)


@pytest.mark.parametrize("left_out", [0, 2, 3])
def test_a_piece_that_is_not_differentiated(left_out):
    results = []
    for student in plain_and_deferred("qwen_image"):
        seen = []

        def backward(loss, seen=seen):
            seen.append(loss)
            if len(seen) != left_out + 1:
                loss.backward()

        results.append(by_micro_batch(student, backward))
    assert_equal(*results)


def test_pieces_in_another_order_are_refused():
    student, kept = student_of("qwen_image"), []
    defer_modulation(student)
    by_micro_batch(student, kept.append)
    kept[-1].backward()
    with pytest.raises(RuntimeError, match="differentiated in order or together, got the last one before others"):
        kept[0].backward()


def test_kept_pieces_may_be_differentiated_twice():
    results = []
    for student in plain_and_deferred("qwen_image"):
        kept = []
        by_micro_batch(student, kept.append)
        sum(kept).backward(retain_graph=True)
        sum(kept).backward()
        results.append(grads(student))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-8, msg=lambda t, n=name: f"{n}: {t}")
