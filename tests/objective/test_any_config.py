"""Any config, any roles, any times: both schedules, every cut into micro-batches and the restatement agree."""

import pytest
import torch
from helpers.batches import (
    COND,
    DIM,
    TEACHERS,
    assert_close,
    assert_same,
    backward,
    gradients,
    step,
    toy_batch,
    toy_draws,
    trained_pair,
    with_times,
)
from helpers.restatement import PlainTeacher, all_terms_loss, partition_loss
from helpers.toy import ToyNet, make_teacher
from hypothesis import given, settings
from hypothesis import strategies as st

from twinflow import TwinFlowConfig, TwinFlowLoss
from twinflow.objective.config import ROLES

WEIGHT = st.sampled_from([0.0, 0.3, 1.0])


@st.composite
def cases(draw, dtype):
    """(config, roles or None, batch, draws)."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    recipe = draw(st.sampled_from(["partition", "all_terms"]))
    adversarial = draw(st.booleans())
    low = draw(st.sampled_from([0.0, 0.3]))
    config = TwinFlowConfig(
        recipe=recipe, adversarial=adversarial, shares=dict.fromkeys(ROLES, 1.0),
        estimate_order=draw(st.integers(1, 4)), enhanced_ratio=draw(st.sampled_from([0.0, 0.5, 4.0])),
        enhanced_range=(low, draw(st.sampled_from([0.6, 1.0, 2.0]))), delta_t=draw(st.sampled_from([0.003, 0.01, 0.3])),
        target_clamp=draw(st.sampled_from([None, 0.1, 1.0])), loss=draw(st.sampled_from(["barron", "l2"])),
        rectify_loss=draw(st.sampled_from(["barron", "l2"])), barron_alpha=draw(st.sampled_from([-1.0, 1.0, 2.0])),
        time_weight=draw(st.booleans()), real_velocity_weight=draw(WEIGHT), adversarial_weight=draw(WEIGHT),
        rectify_weight=draw(WEIGHT), consistency_weight=draw(WEIGHT), data_free=draw(st.booleans()),
    )  # fmt: skip
    rows = draw(st.integers(1, 7))
    roles = draw(st.lists(st.sampled_from(ROLES if adversarial else ROLES[:4]), min_size=rows, max_size=rows))
    batch = toy_batch(rows, dtype)
    draws = toy_draws(config, batch[0], roles if recipe == "partition" else None)
    gap = draw(st.sampled_from([None, 0.0, 1e-7, config.delta_t, 1.0]))
    if gap is not None:
        r = [t if t < 0 else max(t - gap, 0.0) for t in draws.t.tolist()]
        draws = with_times(draws, draws.t.tolist(), r)
    return config, batch, draws


def schedules_and_micro_batches_agree(case, kind, micro_batch):
    config, batch, draws = case
    student, teacher = trained_pair(kind)
    planned = step(config, student, teacher, batch, draws)
    assert_same(planned, step(config, student, teacher, batch, draws, schedule="published"))
    assert_close(backward(config, student, teacher, batch, draws, micro_batch=micro_batch), planned, 1e-5)


def restatement_agrees(case, kind, step_rows):
    config, batch, draws = case
    net = ToyNet(DIM, COND, dtype=torch.float64)
    plain, teacher = PlainTeacher(net, TEACHERS[kind]), make_teacher(net, TEACHERS[kind])
    restated = partition_loss if config.recipe == "partition" else all_terms_loss
    expected = restated(net, plain, config, *batch, draws, step_rows=step_rows)
    if expected.requires_grad:
        expected.backward()
    expected = expected.detach(), gradients(net)
    out = TwinFlowLoss(config)(net, *batch, teacher=teacher, draws=draws, step_rows=step_rows)
    out.loss.backward()
    assert_close((out.loss.detach(), gradients(net)), expected, 1e-8)


KINDS = st.sampled_from(list(TEACHERS))


@settings(max_examples=40, deadline=None)
@given(cases(torch.float32), KINDS, st.integers(1, 8))
def test_schedules_and_micro_batches(case, kind, micro_batch):
    schedules_and_micro_batches_agree(case, kind, micro_batch)


@settings(max_examples=25, deadline=None)
@given(cases(torch.float64), KINDS, st.sampled_from([None, 9]))
def test_restatement(case, kind, step_rows):
    restatement_agrees(case, kind, step_rows)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(cases(torch.float32), KINDS, st.integers(1, 8))
def test_schedules_and_micro_batches_at_length(case, kind, micro_batch):
    schedules_and_micro_batches_agree(case, kind, micro_batch)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(cases(torch.float64), KINDS, st.sampled_from([None, 9]))
def test_restatement_at_length(case, kind, step_rows):
    restatement_agrees(case, kind, step_rows)
