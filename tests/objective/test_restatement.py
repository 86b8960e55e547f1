"""The objective against its plain row-by-row restatement, where the recorded steps have no case."""

import pytest
import torch
from helpers.batches import (
    COND,
    DIM,
    EIGHT,
    FOUR,
    TEACHERS,
    assert_close,
    gradients,
    move,
    toy_batch,
    toy_draws,
    with_times,
)
from helpers.restatement import PlainTeacher, all_terms_loss, partition_loss
from helpers.toy import ToyNet, make_teacher

from twinflow import TwinFlowConfig, TwinFlowLoss
from twinflow.objective.config import ROLES

SHARES_WITH_ONE = {"e2e": 1, "mul": 1, "any": 1, "one": 1, "adv": 1}
SCHEDULES = ("planned", "published", "micro-batches")


def compare(config, kappa, batches, schedule="planned", step_rows=None):
    """Loss and gradients over several steps, the weights moving between them: 1e-9 in float64."""
    net = ToyNet(DIM, COND, dtype=torch.float64)
    teacher, plain = make_teacher(net, kappa), PlainTeacher(net, kappa)
    criterion = TwinFlowLoss(config)
    restated = partition_loss if config.recipe == "partition" else all_terms_loss
    for batch, draws in batches:
        expected = restated(net, plain, config, *batch, draws, step_rows=step_rows)
        if expected.requires_grad:
            expected.backward()
        expected = expected.detach(), gradients(net)
        arguments = dict(teacher=teacher, draws=draws, step_rows=step_rows)
        if schedule == "micro-batches":
            out = criterion.backward(net, *batch, micro_batch=2, **arguments)
        else:
            out = criterion(net, *batch, schedule=schedule, **arguments)
            out.loss.backward()
        assert_close((out.loss.detach(), gradients(net)), expected, 1e-9)
        move(net)


def drawn(config, roles, steps=2):
    """Batches and draws of some steps."""
    batches = []
    for _ in range(steps):
        batch = toy_batch(len(roles), torch.float64)
        batches.append((batch, toy_draws(config, batch[0], roles if config.recipe == "partition" else None)))
    return batches


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("order", range(5))
def test_orders_and_teachers(order, teacher, schedule):
    config = TwinFlowConfig(estimate_order=order)
    compare(config, TEACHERS[teacher], drawn(config, EIGHT), schedule)


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("role", ROLES)
def test_batch_of_one(role, order):
    config = TwinFlowConfig(estimate_order=order, shares=SHARES_WITH_ONE)
    compare(config, 0.9, drawn(config, (role,)))


OPTIONS = {
    "one rows": dict(shares=SHARES_WITH_ONE),
    "one rows, order 1": dict(shares=SHARES_WITH_ONE, estimate_order=1, enhanced_ratio=4.0),
    "adversarial weight": dict(adversarial_weight=0.3),
    "no rectify": dict(rectify_weight=0.0),
    "l2": dict(loss="l2"),
    "l2 rectify": dict(rectify_loss="l2"),
    "barron rectify": dict(loss="l2", rectify_loss="barron"),
    "barron alpha 2": dict(barron_alpha=2.0),
    "barron alpha -1, c 0.5": dict(barron_alpha=-1.0, barron_c=0.5),
    "no clamp": dict(target_clamp=None, loss="l2"),
    "tight clamp": dict(target_clamp=0.05),
    "delta 0.3": dict(delta_t=0.3),
    "delta 1": dict(delta_t=1.0),
    "delta 1e-4": dict(delta_t=1e-4),
    "range": dict(enhanced_range=(0.3, 0.6)),
    "range past 1": dict(enhanced_range=(0.0, 1.5)),
    "no guidance": dict(enhanced_ratio=0.0),
    "no time weight": dict(time_weight=False),
    "time dist": dict(time_dist=(2.0, 0.7, 0.8)),
    "step focus": dict(step_focus=1.0, target_step_count=2),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_partition_options(name):
    config = TwinFlowConfig(**OPTIONS[name])
    roles = (*EIGHT, "one") if config.shares["one"] else EIGHT
    compare(config, 0.9, drawn(config, roles))


@pytest.mark.parametrize("order", range(3))
def test_adversarial_off(order):
    """Neither adv rows nor rectify."""
    config = TwinFlowConfig(adversarial=False, estimate_order=order, shares={"e2e": 1, "mul": 2, "any": 1})
    compare(config, 0.9, drawn(config, ("e2e", "mul", "any", "mul")))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_data_free(recipe, teacher, schedule):
    config = TwinFlowConfig(recipe=recipe, data_free=True, enhanced_ratio=0.8)
    compare(config, TEACHERS[teacher], drawn(config, EIGHT), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("order", [1, 2, 4])
def test_all_terms(order, teacher, schedule):
    config = TwinFlowConfig(recipe="all_terms", estimate_order=order)
    compare(config, TEACHERS[teacher], drawn(config, FOUR), schedule)


ALL_TERMS_OPTIONS = {
    "no real velocity": dict(real_velocity_weight=0.0),
    "no adversarial": dict(adversarial_weight=0.0),
    "no rectify": dict(rectify_weight=0.0),
    "no consistency": dict(consistency_weight=0.0),
    "rectify alone": dict(adversarial_weight=0.0, consistency_weight=0.0, real_velocity_weight=0.0),
    "consistency alone": dict(adversarial_weight=0.0, rectify_weight=0.0),
    "adversarial off": dict(adversarial=False),
    "weights": dict(real_velocity_weight=0.2, adversarial_weight=0.3, rectify_weight=0.4, consistency_weight=0.5),
    "barron": dict(loss="barron"),
    "barron rectify": dict(rectify_loss="barron"),
    "no guidance": dict(enhanced_ratio=0.0),
    "tight clamp": dict(target_clamp=0.05),
    "delta 0.5": dict(delta_t=0.5),
    "delta 1": dict(delta_t=1.0),
}


@pytest.mark.parametrize("name", ALL_TERMS_OPTIONS)
def test_all_terms_options(name):
    config = TwinFlowConfig(recipe="all_terms", **ALL_TERMS_OPTIONS[name])
    compare(config, 0.9, drawn(config, FOUR))


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_part_of_a_larger_step(recipe, order):
    """`step_rows` fixes the denominators; no counting row gives a differentiable zero."""
    if recipe == "all_terms" and order == 0:
        return
    config = TwinFlowConfig(recipe=recipe, estimate_order=order, shares={"e2e": 2, "mul": 1, "any": 1, "adv": 1})
    for roles in (FOUR, ("any", "e2e"), ("any",)):
        compare(config, 0.9, drawn(config, roles, steps=1), step_rows=10)


def test_uncond_of_batch_one():
    config = TwinFlowConfig()
    batches = [((x, cond, uncond[:1]), draws) for (x, cond, uncond), draws in drawn(config, EIGHT)]
    for schedule in SCHEDULES:
        compare(config, 0.9, batches, schedule)


def test_times_at_the_edges():
    """t == r, one delta above r and just beside it, t = 1 in rows that are not e2e, and tiny times."""
    config = TwinFlowConfig(shares=SHARES_WITH_ONE)
    roles = ("any", "any", "any", "any", "mul", "one", "one", "adv", "adv", "e2e")
    t = [0.5, 0.51, 0.51 + 1e-9, 1.0, 1.0, 1e-7, 0.01, -1e-7, -1.0, 1.0]
    r = [0.5, 0.5, 0.5, 0.0, 0.99, 0.0, 0.0, -1e-7, -1.0, 0.0]
    ((batch, draws),) = drawn(config, roles, steps=1)
    compare(config, 0.9, [(batch, with_times(draws, t, r))])
