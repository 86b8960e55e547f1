"""The global random streams of a step: where its calls start, and where they stand afterwards."""

import pytest
import torch
from helpers.batches import COND, DIM, EIGHT, TEACHERS, toy_batch, toy_draws, trained_pair
from helpers.toy import ToyNet, make_teacher

from twinflow import StudentTeacher, TwinFlowConfig, TwinFlowLoss

RECIPES = ("partition", "all_terms")


class Masked(ToyNet):
    """Records the first random number of every call, and one per row of a call of one row."""

    def __init__(self):
        super().__init__(DIM, COND)
        self.seen = []

    def forward(self, x_t, t, r, cond):
        self.seen.append(torch.rand(()).item())
        return super().forward(x_t, t, r, cond)


def run(config, student, teacher=None, roles=EIGHT, **more):
    batch = toy_batch(len(roles))
    draws = toy_draws(config, batch[0], roles if config.recipe == "partition" else None)
    teacher = teacher or StudentTeacher(student)
    torch.manual_seed(11)
    return TwinFlowLoss(config)(student, *batch, teacher=teacher, draws=draws, update_teacher=False, **more)


@pytest.mark.parametrize("schedule", ["planned", "published"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_call_starts_where_the_students_starts(recipe, schedule):
    student = Masked()
    run(TwinFlowConfig(recipe=recipe), student, schedule=schedule)
    torch.manual_seed(11)
    assert set(student.seen) == {torch.rand(()).item()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_calls_of_a_row_agree_and_rows_differ(recipe):
    """`rows`: all calls of a row start alike, and each row from a state of its own."""
    student = Masked()
    config = TwinFlowConfig(recipe=recipe, rng_align="rows")
    out = run(config, student)
    plan = TwinFlowLoss(config).plan(out.draws, teacher=StudentTeacher(student))
    by_row = {}
    for call, number in zip(plan.calls, student.seen, strict=True):
        assert len(call.rows) == 1
        by_row.setdefault(call.rows[0], set()).add(number)
    assert all(len(numbers) == 1 for numbers in by_row.values())
    assert len(set.union(*by_row.values())) == len(by_row) == 8


@pytest.mark.parametrize("rng_align", ["batch", "rows"])
def test_dropout_masks_align_where_row_sets_match(rng_align):
    """Equal cond and uncond: with the masks aligned the guidance is exactly nothing, however large its ratio."""
    student, teacher = trained_pair("ema", dropout=0.1)
    latents, cond, _ = toy_batch(8)
    # A second leaf of another length keeps cond and uncond in two calls, which then have the same rows.
    conditions = (cond, torch.zeros(8, 2)), (cond.clone(), torch.zeros(8, 3))
    draws = toy_draws(TwinFlowConfig(), latents, EIGHT)
    found = []
    for ratio in (0.0, 50.0):
        criterion = TwinFlowLoss(TwinFlowConfig(enhanced_ratio=ratio, rng_align=rng_align))
        torch.manual_seed(11)
        out = criterion(padded(student), latents, *conditions, teacher=PaddedTeacher(teacher), draws=draws)
        found.append(out.loss)
    assert torch.equal(*found)


def padded(net):
    return lambda x_t, t, r, cond: net(x_t, t, r, cond[0])


class PaddedTeacher(StudentTeacher):
    """A teacher whose condition has a second leaf that it ignores."""

    cfg_by = rollout_by = "teacher"

    def __init__(self, teacher):
        self.teacher, self.student = teacher, padded(teacher._student)

    def velocity(self, x_t, t, r, cond, query):
        return self.teacher.velocity(x_t, t, r, cond[0], query)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_masks_align_between_student_and_teacher(teacher):
    """Row by row at dropout 0.1: a student at its teacher's weights walks with the student's masks.

    At t - delta > r the residual of an `any` row at order 1 is ((t-r) F - (t-delta-r) F-(x_m))/delta - v*; the same net
    with the mask written into its weights, and no dropout, must give the same loss.
    """
    student = ToyNet(DIM, COND, dropout=0.1)
    config = TwinFlowConfig(rng_align="rows", estimate_order=2)
    pair = make_teacher(student, TEACHERS[teacher])
    batch = toy_batch(1)
    draws = toy_draws(config, batch[0], ("any",))
    torch.manual_seed(11)
    mask = student.dropout(torch.ones(1, 16))
    torch.manual_seed(11)
    dropped = TwinFlowLoss(config)(student, *batch, teacher=pair, draws=draws, update_teacher=False).loss
    plain = ToyNet(DIM, COND)
    plain.load_state_dict(student.state_dict())
    with torch.no_grad():
        plain.second.weight *= mask
    assert 0 < (mask == 0).sum() < 16 or torch.equal(mask, torch.full((1, 16), mask.max().item()))
    expected = TwinFlowLoss(config)(plain, *batch, teacher=make_teacher(plain, TEACHERS[teacher]), draws=draws).loss
    torch.testing.assert_close(dropped, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["planned", "published"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_afterwards_the_stream_is_where_the_students_call_left_it(recipe, schedule):
    student = ToyNet(DIM, COND, dropout=0.3)
    run(TwinFlowConfig(recipe=recipe), student, schedule=schedule)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    student.dropout(torch.ones(8, 16))
    assert torch.equal(torch.get_rng_state(), after)


def test_without_dropout_the_stream_stays():
    student = ToyNet(DIM, COND)
    for rng_align in ("batch", "rows"):
        run(TwinFlowConfig(rng_align=rng_align), student)
        after = torch.get_rng_state()
        torch.manual_seed(11)
        assert torch.equal(torch.get_rng_state(), after)


def test_an_evaluation_leaves_the_stream_where_the_students_call_left_it():
    student = ToyNet(DIM, COND, dropout=0.3)
    config = TwinFlowConfig()
    batch = toy_batch(8)
    draws = toy_draws(config, batch[0], EIGHT)
    torch.manual_seed(11)
    TwinFlowLoss(config).evaluate(student, *batch, teacher=StudentTeacher(student), draws=draws)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    student.dropout(torch.ones(8, 16))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("fails_at", [0, 2, 4])
def test_an_exception_restores_the_stream(fails_at):
    class Failing(ToyNet):
        def forward(self, *inputs):
            torch.rand(7)
            if len(self.calls) == fails_at:
                raise RuntimeError("network")
            return super().forward(*inputs)

    student = Failing(DIM, COND)
    criterion = TwinFlowLoss(TwinFlowConfig())
    batch = toy_batch(8)
    draws = toy_draws(TwinFlowConfig(), batch[0], EIGHT)
    counter, before = criterion.state_dict(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="network"):
        criterion(student, *batch, teacher=StudentTeacher(student), draws=draws)
    assert torch.equal(torch.get_rng_state(), before)
    assert criterion.state_dict() == counter
