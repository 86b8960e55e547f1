"""Wrong arguments of a step: an error that names argument, wanted and got, and nothing has moved."""

import math
from collections import UserDict
from dataclasses import replace

import pytest
import torch
from helpers.batches import COND, DIM, EIGHT, FOUR, move, toy_batch, toy_draws
from helpers.toy import ToyNet

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss

NAN = math.nan


class World:
    """A criterion, a student and a teacher in the middle of a run, and what a failed step must leave as it is."""

    def __init__(self, **config):
        self.config = TwinFlowConfig(**config)
        self.criterion = TwinFlowLoss(self.config)
        self.student = ToyNet(DIM, COND)
        self.teacher = EMATeacher(self.student, 0.9)
        self.generator = torch.Generator().manual_seed(0)
        self.criterion.draw(torch.zeros(3, DIM))
        self.teacher.update()
        move(self.student)
        self.latents, self.cond, self.uncond = toy_batch(4)
        self.draws = toy_draws(self.config, self.latents, FOUR if self.config.recipe == "partition" else None)

    def state(self):
        shadow = self.teacher.state_dict()
        return {
            "counter": self.criterion.state_dict(),
            "teacher": (shadow["updates"], shadow["current_decay"], [v.tolist() for v in shadow["shadow"].values()]),
            "student": [(p.tolist(), p.grad) for p in self.student.parameters()],
            "generators": (self.generator.get_state().tolist(), torch.get_rng_state().tolist()),
            "calls": list(self.student.calls),
            "tensors": [x.tolist() for x in (self.latents, self.cond, self.uncond)],
        }

    def __call__(self, by="call", **changed):
        given = dict(student=self.student, latents=self.latents, cond=self.cond, uncond=self.uncond,
                     teacher=self.teacher, generator=self.generator) | changed  # fmt: skip
        function = self.criterion if by == "call" else getattr(self.criterion, by)
        return function(given.pop("student"), given.pop("latents"), given.pop("cond"), given.pop("uncond"), **given)


def assert_refused(world, kind, message, **changed):
    before = world.state()
    with pytest.raises(kind, match=message):
        world(**changed)
    assert world.state() == before, "something moved"


ARGUMENTS = [
    (dict(student=3), TypeError, "student must be callable, got int"),
    (dict(latents=torch.zeros(4, DIM).long()), TypeError, "latents must be a floating tensor, got torch.int64"),
    (dict(latents=torch.zeros(4, DIM).cfloat()), TypeError, "latents must be a floating tensor, got torch.complex64"),
    (dict(latents=[[1.0]]), TypeError, "latents must be a floating tensor, got list"),
    (dict(latents=torch.zeros(4)), ValueError, r"latents must be \(B, ...\) with B >= 1, got shape \(4,\)"),
    (dict(latents=torch.zeros(0, DIM)), ValueError, r"latents must be .* got shape \(0, 5\)"),
    (dict(cond=torch.zeros(3, COND)), ValueError, r"cond must be .* batch of 4, got shape \(3, 3\)"),
    (dict(cond=torch.zeros(1, COND)), ValueError, r"cond must be .* batch of 4, got shape \(1, 3\)"),
    (dict(cond={"text": (torch.zeros(4, 1), torch.zeros(5, 1))}), ValueError, r"cond\['text'\]\[1\] must be"),
    (dict(cond={"text": torch.zeros(())}), ValueError, r"cond\['text'\] must be .* got shape \(\)"),
    (dict(cond=torch.zeros(4, COND).numpy()), TypeError, "cond must be a pytree of tensors .* got ndarray"),
    (dict(cond=[UserDict(text=torch.zeros(4, 1))]), TypeError, r"cond\[0\] must be a pytree .* got UserDict"),
    (dict(uncond=torch.zeros(2, COND)), ValueError, r"uncond must be .* batch of 4 or 1, got shape \(2, 3\)"),
    (dict(uncond=None), ValueError, "uncond must be given where enhanced_ratio > 0, got None"),
    (dict(teacher=None), ValueError, "teacher must be given for guidance and rollouts, got None"),
    (dict(teacher=ToyNet()), TypeError, "teacher must be a Teacher, got ToyNet"),
    (dict(cond=torch.zeros(4, COND, device="meta")), ValueError, "cond must be on the latents' device cpu, got meta"),
    (dict(uncond=torch.zeros(1, COND, device="meta")), ValueError, "uncond must be on the latents' device cpu, got m"),
    (dict(step_rows=3), ValueError, "step_rows must be >= the batch of 4, got 3"),
    (dict(step_rows=4.0), TypeError, "step_rows must be an integer, got float"),
    (dict(step_rows=True), TypeError, "step_rows must be an integer, got bool"),
    (dict(generator=7), TypeError, "generator must be a torch.Generator or None, got int"),
    (dict(draws=7), TypeError, "draws must be Draws or None, got int"),
]  # fmt: skip


@pytest.mark.parametrize("by", ["call", "backward", "evaluate"])
@pytest.mark.parametrize("changed, kind, message", ARGUMENTS, ids=lambda value: str(value)[:40])
def test_arguments(changed, kind, message, by):
    assert_refused(World(), kind, message, by=by, **changed)


def test_schedule_and_micro_batch():
    assert_refused(World(), ValueError, "schedule must be one of planned, published, got 'best'", schedule="best")
    for wrong in (0, -1, 1.0, True, None):
        message = f"backward: micro_batch must be an integer >= 1, got {wrong}"
        assert_refused(World(), (TypeError, ValueError), message, by="backward", micro_batch=wrong)


def test_the_config():
    with pytest.raises(TypeError, match="TwinFlowLoss: config must be a TwinFlowConfig, got dict"):
        TwinFlowLoss({"recipe": "partition"})
    with pytest.raises(TypeError, match="TwinFlowLoss: config must be a TwinFlowConfig, got dict"):
        TwinFlowLoss({})


def test_plan():
    world = World()
    good = world.draws
    for wrong, kind, message in [
        (dict(draws="eight"), TypeError, "draws must be Draws or None, got str"),
        (dict(draws=replace(good, t=good.t + 2)), ValueError, r"draws.t must be in \[-1, 1\]"),
        (dict(draws=replace(good, t_rectify=None)), TypeError, "draws.t_rectify must be a float32 or float64 tensor"),
        (dict(teacher=3), TypeError, "teacher must be a Teacher, got int"),
        (dict(micro_batch=0), ValueError, "micro_batch must be an integer >= 1, got 0"),
        (dict(micro_batch=-1), ValueError, "micro_batch must be an integer >= 1, got -1"),
    ]:
        with pytest.raises(kind, match=f"^plan: {message}"):
            world.criterion.plan(**(dict(draws=good) | wrong))


def times(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


GOOD_T, GOOD_R = [1.0, 0.5, 0.5, -0.5], [0.0, 0.49, 0.2, -0.5]
DRAWS = [
    (times(t=[1.0, 0.5, 0.5, -1.5]), ValueError, r"draws.t must be in \[-1, 1\]"),
    (times(t=[1.5, 0.5, 0.5, -0.5]), ValueError, r"draws.t must be in \[-1, 1\]"),
    (times(t=[1.0, NAN, 0.5, -0.5]), ValueError, r"draws.t must be in \[-1, 1\], got \[1.0, nan"),
    (times(r=[0.0, NAN, 0.2, -0.5]), ValueError, r"draws.r must be in \[-1, 1\]"),
    (times(r=[0.0, 0.6, 0.2, -0.5]), ValueError, "draws.r must be between 0 and t"),
    (times(r=[0.0, -0.1, 0.2, -0.5]), ValueError, "draws.r must be between 0 and t"),
    (times(r=[0.0, 0.49, 0.2, -0.6]), ValueError, "draws.r must be t for adv rows, got -0.6"),
    (times(r=[0.0, 0.49, 0.2, -0.4]), ValueError, "draws.r must be t for adv rows, got -0.4"),
    (times(t=[1.0, 0.0, 0.5, -0.5]), ValueError, "draws.r must be between 0 and t"),
    (times(t=[1.0, 0.0, 0.5, -0.5], r=[0.0, -0.1, 0.2, -0.5]), ValueError, "draws.r must be between 0 and t"),
    (times(t=[1.0, -0.5, 0.5, -0.5], r=[0.0, -0.5, 0.2, -0.5]), ValueError, "draws.t must be negative for adv rows"),
    (times(t=[1.0, 0.5, 0.5, 0.5], r=[0.0, 0.49, 0.2, 0.5]), ValueError, "draws.t must be negative for adv rows"),
    (times(t=[1, 0, 0, -1]), TypeError, "draws.t must be a float32 or float64 tensor, got torch.int64"),
    ({"t": torch.tensor(GOOD_T).bfloat16()}, TypeError, "draws.t must be a float32 or float64 tensor, got torch.bf"),
    ({"t": GOOD_T}, TypeError, "draws.t must be a float32 or float64 tensor, got list"),
    ({"t": torch.tensor(GOOD_T)[:3]}, ValueError, r"draws.t must be a CPU tensor of shape \(4,\), got \(3,\)"),
    ({"t": torch.tensor(GOOD_T, device="meta")}, ValueError, r"draws.t must be a CPU tensor .* on meta"),
    ({"t_rectify": torch.tensor([2.0])}, ValueError, r"draws.t_rectify must be in"),
    ({"t_rectify": torch.tensor([-0.5])}, ValueError, r"draws.t_rectify must be in \[0, 1\]"),
    ({"t_rectify": None}, TypeError, "draws.t_rectify must be a float32 or float64 tensor, got NoneType"),
    ({"z_rectify": None}, TypeError, "draws.z_rectify must be a floating tensor, got NoneType"),
    ({"z_fake": None}, TypeError, "draws.z_fake must be a floating tensor, got NoneType"),
    ({"z_fake": torch.zeros(2, DIM)}, ValueError, r"draws.z_fake must be of shape \(1, 5\), got \(2, 5\)"),
    ({"z": torch.zeros(4, DIM + 1)}, ValueError, r"draws.z must be of shape \(4, 5\), got \(4, 6\)"),
    ({"z": torch.zeros(4, DIM, dtype=torch.int32)}, TypeError, "draws.z must be a floating tensor, got torch.int32"),
    ({"z": torch.zeros(4, DIM, device="meta")}, ValueError, "draws.z must be on the latents' device cpu, got meta"),
    ({"roles": None}, ValueError, "draws.roles must be None for all_terms and given for partition, got None"),
    ({"roles": FOUR[:3]}, ValueError, "draws.roles must be 4 names, got 3"),
    ({"roles": 3}, TypeError, "draws.roles must be a tuple of names or None, got int"),
    ({"roles": ("e2e", "mul", "many", "adv")}, ValueError, "draws.roles must be of e2e, mul, any, one, adv"),
]  # fmt: skip


@pytest.mark.parametrize("changed, kind, message", DRAWS, ids=lambda value: str(value)[:50])
def test_draws(changed, kind, message):
    world = World()
    good = replace(world.draws, t=torch.tensor(GOOD_T), r=torch.tensor(GOOD_R))
    world(draws=good)
    world.student.zero_grad()
    assert_refused(world, kind, message, draws=replace(good, **changed))


def test_draws_of_the_other_recipe():
    partition, all_terms = World(), World(recipe="all_terms")
    assert_refused(partition, ValueError, "draws.roles must be", draws=all_terms.draws)
    assert_refused(all_terms, ValueError, "draws.roles must be", draws=partition.draws)


def test_negative_times_in_all_terms():
    world = World(recipe="all_terms")
    t = -world.draws.t
    for draws in (replace(world.draws, t=t, r=t), replace(world.draws, t_rectify=t)):
        assert_refused(world, ValueError, r"draws.t.* must be", draws=draws)


def test_adv_rows_where_adversarial_is_off():
    world = World(adversarial=False)
    draws = toy_draws(TwinFlowConfig(), world.latents, FOUR)
    assert_refused(world, ValueError, r"draws.roles must be .*adv only where adversarial\), got adv", draws=draws)


def test_draws_without_data_noise_in_data_free_mode():
    world = World(data_free=True)
    draws = replace(world.draws, z_data=None)
    assert_refused(world, TypeError, "draws.z_data must be a floating tensor, got NoneType", draws=draws)


def test_draw_checks_latents_and_generator():
    criterion = TwinFlowLoss()
    with pytest.raises(TypeError, match="latents must be a floating tensor"):
        criterion.draw(torch.zeros(4, DIM, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got str"):
        criterion.draw(torch.zeros(4, DIM), generator="cpu")
    assert criterion.state_dict() == TwinFlowLoss().state_dict()


@pytest.mark.parametrize("output, got", [
    (lambda x: x[:, :2], r"torch.float32 \(4, 2\)"), (lambda x: (x,), "tuple"), (lambda x: x.long(), "torch.int64"),
    (lambda x: None, "NoneType"), (lambda x: x[:1], r"torch.float32 \(1, 5\)"),
], ids=["shape", "tuple", "integer", "nothing", "rows"])  # fmt: skip
def test_a_student_that_returns_something_else(output, got):
    """The counter and the random stream stay."""
    config = TwinFlowConfig(adversarial=False, estimate_order=0, enhanced_ratio=0.0)
    criterion = TwinFlowLoss(config)
    latents = torch.zeros(4, DIM)
    draws = toy_draws(config, latents, ("mul",) * 4)
    before = torch.get_rng_state()
    with pytest.raises(
        (TypeError, ValueError), match=rf"student must return a floating velocity \(4, 5\), got .*{got}"
    ):
        criterion(lambda x, t, r, cond: output(x), latents, draws=draws)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe, roles", [("partition", EIGHT), ("all_terms", None)])
def test_check_finite_names_term_and_rows(recipe, roles):
    config = TwinFlowConfig(recipe=recipe, check_finite=True)
    student = ToyNet(DIM, COND)
    latents, cond, uncond = toy_batch(8)
    latents[2] = math.inf
    teacher = EMATeacher(student, 0.9)
    draws = toy_draws(config, latents, roles)
    named = r"rcgm loss is not finite in rows 2 \(any\)$" if roles else "rcgm loss is not finite in rows 2$"
    for function in (TwinFlowLoss(config), TwinFlowLoss(config).backward):
        with pytest.raises(FloatingPointError, match=f"TwinFlowLoss: the {named}"):
            function(student, latents, cond, uncond, teacher=teacher, draws=draws)
    out = TwinFlowLoss(TwinFlowConfig(recipe=recipe))(student, latents, cond, uncond, teacher=teacher, draws=draws)
    assert not torch.isfinite(out.loss)
