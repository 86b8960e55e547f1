"""The validation loss: a step over the held-out rows, at fixed draws, that the run does not notice."""

import math
from dataclasses import fields

import pytest
import torch
from helpers.validation_cases import CPU, cached, settings_for, student_of

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.memory.modulation.defer import defer_modulation
from twinflow.objective.draws import Draws, draw_step
from twinflow.objective.roles import RoleCounter
from twinflow.train.checkpoint.run_state import collect_streams
from twinflow.train.config.objective import FLOW_MATCHING
from twinflow.train.validation import loss as evaluation
from twinflow.train.validation.loss import Evaluation

CONFIGS = {
    "all_terms": TwinFlowConfig(recipe="all_terms", adversarial=True),
    "partition": TwinFlowConfig(recipe="partition"),
    "smooth": TwinFlowConfig(recipe="partition", loss="l2", delta_t=0.5, target_clamp=None),
    "flow matching": FLOW_MATCHING,
}


def entries_of(size: tuple[int, int]) -> list:
    """Entries of one size, in the order in which they are evaluated."""
    return sorted((e for e in cached("sd3").entries if e.size == size), key=lambda e: e.content)


def sizes() -> list[tuple[int, int]]:
    return sorted({e.size for e in cached("sd3").entries})


def draws_of(config: TwinFlowConfig, entries: list, seed: int) -> list[Draws]:
    shares = config.active_shares() if config.recipe == "partition" else {}
    roles = [(role,) for role in RoleCounter(shares).take(len(entries))] if shares else [None] * len(entries)
    return [
        draw_step(config, cached("sd3").latents([entry]).float(), roles[k], torch.Generator().manual_seed(seed + k), k)
        for k, entry in enumerate(entries)
    ]


def joined(parts: list[Draws]) -> Draws:
    """The draws of rows as a batch's."""
    columns = {f.name: [v for p in parts if (v := getattr(p, f.name)) is not None] for f in fields(Draws)}
    roles = columns.pop("roles")
    return Draws(
        tuple(role for row in roles for role in row) or None,
        **{name: torch.cat(found) if found else None for name, found in columns.items()},
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_loss_of_one_step_over_all_rows(name, tmp_path):
    config, cache, size = CONFIGS[name], cached("sd3"), sizes()[-1]
    student = student_of(settings_for(tmp_path))
    teacher = EMATeacher(student, 0.9)
    entries = entries_of(size)
    assert len(entries) >= 4
    found = Evaluation(config, cache, entries[::-1], device=CPU, seed=3).run(student, teacher)
    batch = cache.latents(entries).float(), cache.condition(entries), cache.uncond_at(size)
    draws = joined(draws_of(config, entries, 3))
    out = TwinFlowLoss(config).evaluate(student, *batch, teacher=teacher, draws=draws, step_rows=len(entries))
    assert found["loss"] == pytest.approx(float(out.loss), rel=1e-4) and found["loss"] > 0
    assert found["terms"] == {key: pytest.approx(float(value), rel=1e-4) for key, value in out.terms.items()}
    assert sum(found["terms"].values()) == pytest.approx(found["loss"])


def test_plain_flow_matching_is_the_squared_error_of_the_velocity(tmp_path):
    cache, student = cached("sd3"), student_of(settings_for(tmp_path, twinflow_enabled=False, use_ema=False))
    entries = sorted(cache.entries, key=lambda e: e.content)
    assert len({e.size for e in entries}) > 1
    errors = []
    for entry, draws in zip(entries, draws_of(FLOW_MATCHING, entries, 0), strict=True):
        x, t = cache.latents([entry]).float(), draws.t
        with torch.no_grad():
            velocity = student((1 - t) * x + t * draws.z, t, t, cache.condition([entry]))
        errors.append(float(((velocity - (draws.z - x)) ** 2).mean()))
    found = Evaluation(FLOW_MATCHING, cache, entries, device=CPU).run(student, None)
    assert found["loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_training_in_between_changes_neither_draws_nor_run(tmp_path):
    """The same weights have the same loss, bit for bit; streams, teacher, counters and modes are as before."""
    cache, student = cached("sd3"), student_of(settings_for(tmp_path))
    teacher, config = EMATeacher(student, 0.9), CONFIGS["partition"]
    teacher.update()
    criterion, generator = TwinFlowLoss(config), torch.Generator().manual_seed(1)
    watched = Evaluation(config, cache, cache.entries, device=CPU, seed=3)
    student.train()
    student.network.transformer_blocks[0].ff.net[1].p = 0.5
    streams, counters, shadow = collect_streams({"run": generator}), criterion.state_dict(), teacher.state_dict()
    first = watched.run(student, teacher)
    after = collect_streams({"run": generator})
    assert torch.equal(after["torch"], streams["torch"]) and criterion.state_dict() == counters
    assert all(torch.equal(value, shadow["shadow"][name]) for name, value in teacher.state_dict()["shadow"].items())
    assert teacher.updates == 1 and all(module.training for module in student.modules())
    assert all(parameter.grad is None for parameter in student.parameters())
    entry = cache.entries[0]
    batch = cache.latents([entry]).float(), cache.condition([entry]), cache.uncond_at(entry.size)
    criterion.backward(student, *batch, teacher=teacher, generator=generator, update_teacher=False)
    assert watched.run(student, teacher) == first
    assert Evaluation(config, cache, cache.entries[::-1], device=CPU, seed=3).run(student, teacher) == first
    assert Evaluation(config, cache, cache.entries, device=CPU, seed=4).run(student, teacher) != first
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5 if parameter.requires_grad else 1)
    assert watched.run(student, teacher)["loss"] != first["loss"]


def test_deferred_modulation_gives_the_same_loss(tmp_path):
    cache, student = cached("sd3"), student_of(settings_for(tmp_path))
    config, teacher = CONFIGS["smooth"], EMATeacher(student, 0.9)
    watched = Evaluation(config, cache, cache.entries, device=CPU)
    plain = watched.run(student, teacher)
    with defer_modulation(student):
        deferred = watched.run(student, EMATeacher(student, 0.9, adapter="deferred"))
    assert deferred["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_which_rows_are_used(monkeypatch, tmp_path):
    cache = cached("sd3")
    monkeypatch.setattr(evaluation, "MOST_ROWS", 3)
    few = Evaluation(FLOW_MATCHING, cache, cache.entries, device=CPU)
    lowest = sorted(cache.entries, key=lambda e: e.content)[:3]
    assert len(few) == 3
    student = student_of(settings_for(tmp_path, twinflow_enabled=False))
    monkeypatch.undo()
    assert few.run(student, None) == Evaluation(FLOW_MATCHING, cache, lowest, device=CPU).run(student, None)
    with pytest.raises(ValueError, match="entries must hold something to evaluate on, got none; raise eval_share"):
        Evaluation(FLOW_MATCHING, cache, [], device=CPU)


def test_a_model_that_has_diverged_has_no_loss(tmp_path):
    cache, student = cached("sd3"), student_of(settings_for(tmp_path, twinflow_enabled=False))
    with torch.no_grad():
        student.network.proj_out.weight.fill_(float("nan"))
    assert math.isnan(Evaluation(FLOW_MATCHING, cache, cache.entries[:2], device=CPU).run(student, None)["loss"])
