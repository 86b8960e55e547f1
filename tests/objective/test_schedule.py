"""The planned schedule is the published one: the same bits of loss and gradients, with fewer rows."""

import statistics
import weakref

import pytest
import torch
from helpers.batches import (
    EIGHT,
    TEACHERS,
    assert_close,
    assert_same,
    backward,
    step,
    toy_batch,
    toy_draws,
    trained_pair,
)

from twinflow import TwinFlowConfig, TwinFlowLoss
from twinflow.objective.plan import make_plan

RECIPES = ("partition", "all_terms")


def both_schedules(config, teacher_kind="ema", roles=EIGHT, dtype=torch.float32, **net):
    """(loss, gradients) of both schedules on the same draws."""
    student, teacher = trained_pair(teacher_kind, dtype, **net)
    batch = toy_batch(len(roles), dtype)
    draws = toy_draws(config, batch[0], roles if config.recipe == "partition" else None)
    state = torch.get_rng_state()
    found = []
    for schedule in ("planned", "published"):
        torch.set_rng_state(state)
        found.append(step(config, student, teacher, batch, draws, schedule=schedule))
    return found


@pytest.mark.parametrize("clamp", [1.0, None])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_planned_equals_published_bit_for_bit(recipe, order, teacher, clamp):
    config = TwinFlowConfig(recipe=recipe, estimate_order=order, target_clamp=clamp)
    assert_same(*both_schedules(config, teacher))


@pytest.mark.parametrize("options", [
    dict(loss="l2", rectify_loss="barron"), dict(loss="barron", rectify_loss="l2"), dict(barron_alpha=2.0),
    dict(enhanced_ratio=0.0), dict(enhanced_range=(0.2, 0.7)), dict(delta_t=0.4), dict(rectify_weight=0.0),
    dict(adversarial_weight=0.0), dict(adversarial=False), dict(time_weight=False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("recipe", RECIPES)
def test_planned_equals_published_for_options(recipe, options):
    roles = EIGHT if options.get("adversarial", True) else ("e2e", "mul", "any", "one")
    config = TwinFlowConfig(recipe=recipe, **options)
    assert_same(*both_schedules(config, roles=roles))


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_planned_equals_published_data_free(recipe, teacher):
    assert_same(*both_schedules(TwinFlowConfig(recipe=recipe, data_free=True), teacher))


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_planned_equals_published_with_dropout_row_by_row(recipe, teacher):
    """`rng_align="rows"`: the mask of a row is the same in all its calls, whatever calls there are."""
    config = TwinFlowConfig(recipe=recipe, rng_align="rows")
    assert_same(*both_schedules(config, teacher, dropout=0.1))


def test_planned_equals_published_at_order_zero():
    """The student runs fewer rows there, so its weight gradients are summed differently."""
    for teacher in TEACHERS:
        planned, published = both_schedules(TwinFlowConfig(estimate_order=0), teacher)
        assert_close(planned, published, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("recipe", RECIPES)
def test_micro_batches_equal_the_batch(recipe, micro_batch, dtype):
    config = TwinFlowConfig(recipe=recipe)
    student, teacher = trained_pair("ema", dtype)
    batch = toy_batch(8, dtype)
    draws = toy_draws(config, batch[0], EIGHT if recipe == "partition" else None)
    whole = step(config, student, teacher, batch, draws)
    assert_close(backward(config, student, teacher, batch, draws, micro_batch=micro_batch), whole, 1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_no_call_exceeds_the_micro_batch(recipe, micro_batch):
    config = TwinFlowConfig(recipe=recipe)
    student, teacher = trained_pair("student")
    batch = toy_batch(8)
    draws = toy_draws(config, batch[0], EIGHT if recipe == "partition" else None)
    backward(config, student, teacher, batch, draws, micro_batch=micro_batch)
    assert max(rows for rows, _ in student.calls) <= micro_batch


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_student_graph_does_not_stand_while_the_teacher_runs(recipe, micro_batch):
    """All target calls come before the first differentiated one; only rectify needs the student's output."""
    config = TwinFlowConfig(recipe=recipe, data_free=True)
    draws = toy_draws(config, toy_batch(8)[0], EIGHT if recipe == "partition" else None)
    calls = TwinFlowLoss(config).plan(draws, micro_batch=micro_batch).calls
    first = next(i for i, call in enumerate(calls) if call.gradient)
    assert all(call.gradient or call.name == "rectify" for call in calls[first:])
    assert {call.name for call in calls[:first]} == {"data", "cfg", "rollout"} | (
        {"fake"} if recipe == "partition" else set()
    )


def live_graphs(student):
    """A forward hook that counts the student's outputs whose graph is alive, and the list of counts per call."""
    alive, counts = [], []

    def hook(module, inputs, output):
        counts.append(sum(reference() is not None for reference in alive))
        if output.grad_fn is not None:
            alive.append(weakref.ref(output))

    return student.register_forward_hook(hook), counts


@pytest.mark.parametrize("recipe", RECIPES)
def test_backward_holds_one_micro_batch(recipe):
    """No output of an earlier micro-batch lives on: memory is that of one."""
    config = TwinFlowConfig(recipe=recipe)
    student, teacher = trained_pair("ema")
    batch = toy_batch(8)
    draws = toy_draws(config, batch[0], EIGHT if recipe == "partition" else None)
    handle, counts = live_graphs(student)
    backward(config, student, teacher, batch, draws, micro_batch=1)
    assert max(counts) <= (1 if recipe == "partition" else 4)
    handle.remove()


# E[rows without gradient] / B at order 2 and equal shares: samples 1/4, guidance 2 x 1/2, rectify 2 x 1/4, rollouts
# 2 x 1/4 (1 + P(0.05 U t >= 0.01) + P(U t >= 0.01)) with P(U t < a) = a (1 - ln a).
PLANNED_ROWS, PUBLISHED_ROWS = 2.961, 4.75


@pytest.mark.parametrize("batch", [8, 24])
def test_rows_without_gradient(batch):
    """2.96 B on average, against 4.75 B published; within four standard errors of 400 steps."""
    config = TwinFlowConfig()
    criterion, latents = TwinFlowLoss(config), torch.zeros(batch, 1)
    plans = [criterion.plan(criterion.draw(latents)) for _ in range(400)]
    rows = [plan.rows_without_gradient / batch for plan in plans]
    error = statistics.stdev(rows) / len(rows) ** 0.5
    assert error < 0.01
    assert abs(statistics.mean(rows) - PLANNED_ROWS) < 4 * error
    assert all(plan.published_rows == PUBLISHED_ROWS * batch for plan in plans)


@pytest.mark.parametrize("schedule", ["planned", "published"])
@pytest.mark.parametrize("batch", [8, 24])
def test_rows_executed_are_the_plan(batch, schedule):
    config = TwinFlowConfig()
    student, teacher = trained_pair("student")
    criterion = TwinFlowLoss(config)
    for _ in range(5):
        tensors = toy_batch(batch)
        draws = criterion.draw(tensors[0])
        plan = criterion.plan(draws, teacher=teacher, schedule=schedule)
        student.calls.clear()
        step(config, student, teacher, tensors, draws, schedule=schedule)
        assert student.calls == [(len(call.rows), call.gradient) for call in plan.calls]
        assert sum(rows for rows, gradient in student.calls if not gradient) == plan.rows_without_gradient
        if schedule == "published":
            assert plan.rows_without_gradient == 4.75 * batch


def test_work_that_need_not_be_done():
    """No guidance of e2e and adv rows, no rollout of adv rows nor of rows whose rollout is empty."""
    config = TwinFlowConfig()
    roles = ("e2e", "mul", "any", "adv", "any")
    draws = toy_draws(config, torch.zeros(5, 1), roles)
    draws = type(draws)(**{**vars(draws), "t": torch.tensor([1.0, 0.5, 0.5, -0.5, 0.5]),
                           "r": torch.tensor([0.0, 0.495, 0.2, -0.5, 0.492])})  # fmt: skip
    calls = {call.name: call for call in make_plan(config, draws).calls}
    assert calls["cfg"].rows == (1, 2, 4, 1, 2, 4)
    assert calls["rollout"].rows == (0, 2)
    assert calls["fake"].rows == (3,)
    assert calls["rectify"].rows == (0, 0)
    assert calls["student"].rows == (0, 1, 2, 3, 4)


def test_rows_that_do_not_count_are_not_run_at_order_zero():
    config = TwinFlowConfig(estimate_order=0)
    draws = toy_draws(config, torch.zeros(8, 1), EIGHT)
    for weight, expected in ((0.5, ("e2e", "mul", "adv")), (0.0, ("mul", "adv"))):
        plan = make_plan(TwinFlowConfig(estimate_order=0, rectify_weight=weight), draws)
        (student,) = [call for call in plan.calls if call.gradient]
        assert student.rows == tuple(i for i, role in enumerate(EIGHT) if role in expected)
        assert all(EIGHT[row] == "mul" for call in plan.calls if call.name == "cfg" for row in call.rows)


def test_the_plan_prints_both_row_counts():
    config = TwinFlowConfig()
    plan = TwinFlowLoss(config).plan(toy_draws(config, torch.zeros(8, 1), EIGHT))
    text = str(plan)
    assert f"rows without gradient: {plan.rows_without_gradient} (published schedule: 38)" in text
    assert all(call.name in text for call in plan.calls)
