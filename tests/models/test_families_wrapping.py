"""Conditioned students of the real classes under checkpointing, compilation, DDP and peft: as the plain ones."""

import copy

import pytest
import torch
from helpers.batches import gradients
from helpers.family_batches import FAMILIES, Graphs, make_batch, make_student, relative, spread
from helpers.tiny_pipelines import tiny_transformer
from peft import LoraConfig, get_peft_model

from twinflow import EMATeacher, FrozenTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.conditioning import MODES
from twinflow.lora import add_lora
from twinflow.models import load

T, R = torch.tensor([0.9, 0.31, 0.5, 1.0]), torch.tensor([0.2, 0.31, 0.0, 0.7])
BOTH = ("dual+sign", "midpoint+sign")
REGIONAL = [family for family in FAMILIES if getattr(tiny_transformer(family), "_repeated_blocks", None)]


def run(student, batch, called=None):
    """Velocities of the real and the fake trajectory, and the gradients of both."""
    (x, cond, _), called = batch, student if called is None else called
    velocities = [called(x, t, r, cond) for t, r in ((T, R), (-T, -T))]
    sum((velocity * x).sum() for velocity in velocities).backward()
    return [v.detach() for v in velocities], gradients(student)


def assert_equal_runs(student, found, expected, tolerance=1e-5):
    for a, b in zip(found[0], expected[0], strict=True):
        assert relative(a, b) < tolerance
    size = max(value.norm() for value in expected[1].values())
    for name, value in expected[1].items():
        assert (found[1][name] - value).norm() <= tolerance * size, name
    for name, parameter in student.named_parameters():
        if name.split(".")[1] in student.conditioning.names:
            assert found[1][name].any() and parameter.requires_grad, name


# Gradient checkpointing.


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family, mode, lora):
    student = make_student(family, mode)
    student = spread(add_lora(student, 2) if lora else student).train()
    batch = make_batch(family, student, 4)
    expected, blocks = run(student, batch), []
    student.network.enable_gradient_checkpointing()
    block = next(m for m in student.network.children() if isinstance(m, torch.nn.ModuleList))[-1]
    block.register_forward_pre_hook(lambda *_: blocks.append(1))
    assert_equal_runs(student, run(student, batch), expected)
    assert len(blocks) == 4, "each of two calls is computed again"


def test_checkpointed_blocks_are_recomputed_with_the_students_adapter():
    """The teacher's passes lie between the student's forward and its backward."""
    student = spread(add_lora(make_student("sd3", "dual+sign"), 2)).train()
    batch = make_batch("sd3", student, 4)
    teacher = EMATeacher(student, 0.9)
    spread(student)
    expected = run(student, batch)
    student.network.enable_gradient_checkpointing()
    x, cond, _ = batch
    velocities = [student(x, t, r, cond) for t, r in ((T, R), (-T, -T))]
    teacher.velocity(x, T, R, cond, query="rollout")
    sum((velocity * x).sum() for velocity in velocities).backward()
    assert_equal_runs(student, ([v.detach() for v in velocities], gradients(student)), expected)


# Compilation.


@pytest.mark.parametrize("family, mode", [
    ("qwen_image", "dual+sign"), pytest.param("sd3", "midpoint+sign", marks=pytest.mark.slow),
    *(pytest.param(f, "dual+sign", marks=pytest.mark.slow) for f in sorted({*FAMILIES} - {"qwen_image"})),
])  # fmt: skip
def test_a_compiled_student(family, mode):
    student = spread(make_student(family, mode))
    batch, graphs = make_batch(family, student, 4), Graphs()
    expected = run(student, batch)
    compiled = torch.compile(student, backend=graphs, fullgraph=True)
    assert_equal_runs(student, run(student, batch, compiled), expected)
    assert graphs.count == 1, "times are inputs of the graph"


@pytest.mark.parametrize("family", [REGIONAL[0], *(pytest.param(f, marks=pytest.mark.slow) for f in REGIONAL[1:])])
def test_compiled_repeated_blocks(family):
    student = spread(add_lora(make_student(family, "dual+sign"), 2))
    batch, graphs = make_batch(family, student, 4), Graphs()
    expected = run(student, batch)
    student.network.compile_repeated_blocks(backend=graphs)
    assert_equal_runs(student, run(student, batch), expected)
    assert graphs.count > 0


@pytest.mark.parametrize("how, make", [
    ("whole", lambda s: EMATeacher(s, 0.9)), ("regional", lambda s: EMATeacher(s, 0.9)), ("regional", FrozenTeacher),
    pytest.param("whole", FrozenTeacher, marks=pytest.mark.slow),
], ids=["whole-ema", "regional-ema", "regional-frozen", "whole-frozen"])  # fmt: skip
def test_the_teacher_of_a_compiled_lora_student(how, make):
    """What is compiled follows the slot: teacher and student each compute with their own weights, again and again."""
    student = spread(add_lora(make_student("qwen_image", "dual+sign"), 2))
    x, cond, _ = make_batch("qwen_image", student, 4)
    graphs = Graphs()
    called = torch.compile(student, backend=graphs) if how == "whole" else student
    if how == "regional":
        student.network.compile_repeated_blocks(backend=graphs)
    teacher = make(called)
    spread(student)

    def answers():
        with torch.no_grad():
            return called(x, T, R, cond), teacher.velocity(x, T, R, cond, query="cfg")

    with torch.compiler.set_stance("force_eager"):
        expected = answers()
    assert relative(*expected) > 1e-3 and graphs.count == 0
    for _ in range(3):
        assert all(relative(a, b) < 1e-5 for a, b in zip(answers(), expected, strict=True))
    assert graphs.count > 0


@pytest.mark.parametrize("lora", [False, True])
def test_a_step_of_a_compiled_student(lora):
    config = TwinFlowConfig(delta_t=0.5, shares={"any": 1}, adversarial=False, enhanced_ratio=0.0)
    student = make_student("sd3", "dual+sign")
    student = spread(add_lora(student, 2) if lora else student)
    batch = make_batch("sd3", student, 4)
    draws = TwinFlowLoss(config).draw(batch[0])
    results = []
    for name, called in (("plain", student), ("compiled", torch.compile(student, backend=Graphs()))):
        teacher = EMATeacher(called, 0.9, adapter=name) if lora else EMATeacher(student, 0.9)
        out = TwinFlowLoss(config)(called, *batch, teacher=teacher, draws=draws)
        out.loss.backward()
        results.append((out.loss.item(), gradients(student)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    size = max(value.norm() for value in results[0][1].values())
    assert all((results[1][1][name] - value).norm() < 1e-4 * size for name, value in results[0][1].items())


# peft's wrappers.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_model_inside(family, mode):
    """load(get_peft_model(transformer)) is the student that add_lora makes, gradients included."""
    ours = add_lora(make_student(family), 2, conditioning=mode)
    targets = ours.network.peft_config["default"].target_modules
    wrapped = get_peft_model(tiny_transformer(family), LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    theirs = load(wrapped, conditioning=mode)
    assert type(theirs) is type(ours) and theirs.transformer is wrapped
    theirs.network.load_state_dict(spread(ours).network.state_dict())
    batch = make_batch(family, ours, 4)
    found, expected = run(theirs, batch), run(ours, batch)
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    got = {name.removeprefix("transformer.base_model.model."): value for name, value in found[1].items()}
    for name, value in expected[1].items():
        assert torch.equal(got[name.removeprefix("transformer.")], value)
    reached = [name.removeprefix("transformer.") for name, value in expected[1].items() if value.any()]
    assert all("lora_" in name or name.startswith(ours.conditioning.names) for name in reached)
    assert len(reached) > 10 and any(name.startswith(ours.conditioning.names) for name in reached) == (
        mode != "midpoint"
    )


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_copy_of_a_lora_student(family, mode):
    student = spread(add_lora(make_student(family), 2, conditioning=mode))
    batch = make_batch(family, student, 4)
    expected = run(student, batch)
    other = copy.deepcopy(student)
    spread(other)
    assert_equal_runs(student, run(student, batch), expected)
    assert not torch.equal(run(other, batch)[0][0], expected[0][0])


def test_a_frozen_conditioning_is_refused_until_it_is_trained():
    student = make_student("sd3", "dual+sign")
    student.network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    batch = make_batch("sd3", student, 4)
    teacher = EMATeacher(student, 0.9)
    message = (
        r"the conditioning \(time_text_embed_2, time_sign_embed\) must require grad, got it frozen .* call student"
    )
    with pytest.raises(ValueError, match=message):
        TwinFlowLoss()(student, *batch, teacher=teacher)
    student.conditioning.requires_grad_()
    out = TwinFlowLoss()(student, *batch, teacher=EMATeacher(student, 0.9, adapter="second"))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in student.conditioning.parameters())
