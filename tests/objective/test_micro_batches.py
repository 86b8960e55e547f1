"""A step in parts: micro-batches of one role, accumulation, and what a part may move."""

import pytest
import torch
from helpers.batches import FOUR, assert_close, gradients, move, toy_batch, toy_draws, trained_pair

from twinflow import Draws, EMATeacher, TwinFlowConfig, TwinFlowLoss


def row_of(draws: Draws, row: int) -> Draws:
    """The draws of one row; every role of FOUR occurs once."""
    role = draws.roles[row] if draws.roles else None

    def one(noise, wanted):
        if noise is None or (role is not None and wanted and role != wanted):
            return None
        return noise if role is not None and wanted else noise[row : row + 1]

    return Draws(
        roles=None if role is None else (role,), t=draws.t[row : row + 1], r=draws.r[row : row + 1],
        z=draws.z[row : row + 1], z_fake=one(draws.z_fake, "adv"), z_data=one(draws.z_data, None),
        z_rectify=one(draws.z_rectify, "e2e"), t_rectify=one(draws.t_rectify, "e2e"),
    )  # fmt: skip


@pytest.mark.parametrize("by_micro_batch", [False, True])
@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_four_one_role_parts_are_one_batch_of_four(recipe, order, by_micro_batch):
    """`step_rows=4`: the same step to 1e-6, and the same terms."""
    config = TwinFlowConfig(recipe=recipe, estimate_order=order, data_free=True)
    student, teacher = trained_pair("ema")
    latents, cond, uncond = toy_batch(4)
    draws = toy_draws(config, latents, FOUR if recipe == "partition" else None)
    criterion = TwinFlowLoss(config)
    whole = criterion(student, latents, cond, uncond, teacher=teacher, draws=draws, update_teacher=False)
    whole.loss.backward()
    expected = whole.loss.detach(), gradients(student)
    loss, terms = torch.zeros(()), dict.fromkeys(whole.terms, 0.0)
    for row in range(4):
        at = slice(row, row + 1)
        arguments = dict(teacher=teacher, draws=row_of(draws, row), step_rows=4, update_teacher=False)
        part = (criterion.backward if by_micro_batch else criterion)(
            student, latents[at], cond[at], uncond[at], **arguments
        )  # fmt: skip
        if not by_micro_batch:
            part.loss.backward()
        loss = loss + part.loss.detach()
        for name, value in part.terms.items():
            terms[name] += value.item()
    assert_close((loss, gradients(student)), expected, 1e-6)
    assert terms == pytest.approx({name: value.item() for name, value in whole.terms.items()}, rel=1e-5)


def test_four_parts_with_roles_from_the_counter_are_one_step():
    """Batches of one take the roles that one batch of four has."""
    config = TwinFlowConfig()
    student, teacher = trained_pair("student")
    parts, whole = TwinFlowLoss(config), TwinFlowLoss(config)
    latents, cond, uncond = toy_batch(4)
    assert set(whole.draw(latents).roles) == set(FOUR)
    roles = []
    for row in range(4):
        at = slice(row, row + 1)
        out = parts(student, latents[at], cond[at], uncond[at], teacher=teacher, step_rows=4)
        roles += out.draws.roles
    assert sorted(roles) == sorted(FOUR)
    assert parts.state_dict() == whole.state_dict()


@pytest.mark.parametrize("by_micro_batch", [False, True])
def test_the_teacher_moves_once_per_optimizer_step(by_micro_batch):
    config = TwinFlowConfig()
    student, _ = trained_pair("student")
    teacher = EMATeacher(student, 0.9)
    criterion = TwinFlowLoss(config)
    for optimizer_step in range(3):
        for part in range(4):
            batch = toy_batch(1)
            arguments = dict(teacher=teacher, step_rows=4, update_teacher=part == 0)
            out = (criterion.backward if by_micro_batch else criterion)(student, *batch, **arguments)
            if not by_micro_batch:
                out.loss.backward()
            assert teacher.updates == optimizer_step + 1
        move(student)


def test_the_teacher_moves_before_it_is_asked():
    """The first update copies the student, so the step equals that of the student as its own teacher."""
    config = TwinFlowConfig()
    student, _ = trained_pair("student")
    teacher = EMATeacher(student, 0.9)
    move(student)
    batch = toy_batch(4)
    draws = toy_draws(config, batch[0], FOUR)
    out = TwinFlowLoss(config)(student, *batch, teacher=teacher, draws=draws)
    student_taught = trained_pair("student")[1]
    student_taught.student = student
    expected = TwinFlowLoss(config)(student, *batch, teacher=student_taught, draws=draws)
    assert torch.equal(out.loss, expected.loss)


def test_backward_adds_to_the_gradients_and_detaches():
    config = TwinFlowConfig()
    student, teacher = trained_pair("student")
    batch = toy_batch(4)
    draws = toy_draws(config, batch[0], FOUR)
    criterion = TwinFlowLoss(config)
    out = criterion.backward(student, *batch, teacher=teacher, draws=draws)
    once = {name: p.grad.clone() for name, p in student.named_parameters()}
    criterion.backward(student, *batch, teacher=teacher, draws=draws)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])
    assert not out.loss.requires_grad


def test_backward_uses_the_given_function():
    """As `accelerator.backward`, which scales."""
    config = TwinFlowConfig()
    student, teacher = trained_pair("student")
    batch = toy_batch(4)
    draws = toy_draws(config, batch[0], FOUR)
    criterion = TwinFlowLoss(config)
    criterion.backward(student, *batch, teacher=teacher, draws=draws)
    once = gradients(student)
    seen = []

    def scaled(loss):
        seen.append(loss.item())
        (loss / 8).backward()

    out = criterion.backward(student, *batch, teacher=teacher, draws=draws, backward=scaled)
    assert len(seen) == 4 and sum(seen) == pytest.approx(out.loss.item())
    for name, value in gradients(student).items():
        torch.testing.assert_close(value, once[name] / 8)


@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_terms_sum_to_the_loss(recipe):
    config = TwinFlowConfig(recipe=recipe)
    student, teacher = trained_pair("ema")
    for micro_batch in (None, 3):
        criterion = TwinFlowLoss(config)
        more = {} if micro_batch is None else {"micro_batch": micro_batch}
        out = (criterion if micro_batch is None else criterion.backward)(
            student, *toy_batch(8), teacher=teacher, **more
        )
        names = {"rcgm", "adversarial", "rectify"}
        assert set(out.terms) == (names if recipe == "partition" else names | {"real_velocity", "consistency"})
        assert sum(out.terms.values()).item() == pytest.approx(out.loss.item(), rel=1e-5)
        assert all(not value.requires_grad and value.dim() == 0 for value in out.terms.values())


def test_no_counting_row_gives_a_differentiable_zero():
    """Order 0 and an `any` row: the loss can be added and differentiated."""
    config = TwinFlowConfig(estimate_order=0)
    student, teacher = trained_pair("student")
    batch = toy_batch(1)
    for schedule in ("planned", "published"):
        out = TwinFlowLoss(config)(
            student, *batch, teacher=teacher, draws=toy_draws(config, batch[0], ("any",)), schedule=schedule
        )  # fmt: skip
        assert out.loss.item() == 0.0
        out.loss.backward()
        assert all(not value.any() for value in gradients(student).values())
