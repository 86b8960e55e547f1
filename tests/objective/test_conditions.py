"""Conditions are any pytree; cond and uncond are one call where they can be."""

from dataclasses import dataclass

import pytest
import torch
from helpers.batches import COND, DIM, EIGHT, gradients, toy_batch, toy_draws
from helpers.toy import ToyNet

from twinflow import StudentTeacher, TwinFlowConfig, TwinFlowLoss


class Reading(ToyNet):
    """ToyNet behind a reader that gets its condition out of a pytree; keeps what it was given."""

    def __init__(self, read):
        super().__init__(DIM, COND)
        self.read, self.given = read, []

    def forward(self, x_t, t, r, cond):
        self.given.append(cond)
        return super().forward(x_t, t, r, self.read(cond))


def text_of(rows):
    """Mean over a text axis."""
    return rows.mean(1) if rows.dim() == 3 else rows


@dataclass
class Opaque:
    """A leaf that is no tensor."""

    name: str


SHAPES = {
    "tensor": (lambda c: c, lambda c: c),
    "tuple": (lambda c: (c, c.clone()), lambda c: (c[0] + c[1]) / 2),
    "dict": (lambda c: {"text": c, "mask": c > 0}, lambda c: c["text"] * (1 + 0 * c["mask"])),
    "nested": (lambda c: {"a": [c, {"b": (c,)}]}, lambda c: (c["a"][0] + c["a"][1]["b"][0]) / 2),
    "other leaves": (lambda c: {"text": c, "scale": 2.0, "name": "x", "none": None, "flag": True},
                     lambda c: c["text"] * c["scale"] / 2),
    "opaque": (lambda c: [c, Opaque("x")], lambda c: c[0]),
    "three axes": (lambda c: c[:, None].repeat(1, 4, 1), lambda c: c.mean(1)),
}  # fmt: skip


def run(config, student, latents, cond, uncond, draws, **more):
    teacher = StudentTeacher(student)
    out = TwinFlowLoss(config)(student, latents, cond, uncond, teacher=teacher, draws=draws, **more)
    out.loss.backward()
    return [out.loss.detach(), *gradients(student).values()]


@pytest.mark.parametrize("schedule", ["planned", "published"])
@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_pytree_gives_the_same_step(shape, recipe, schedule):
    wrap, read = SHAPES[shape]
    config = TwinFlowConfig(recipe=recipe)
    latents, cond, uncond = toy_batch(8)
    draws = toy_draws(config, latents, EIGHT if recipe == "partition" else None)
    student = Reading(read)
    found = run(config, student, latents, wrap(cond), wrap(uncond), draws, schedule=schedule)
    student.read = lambda c: c
    expected = run(config, student, latents, cond, uncond, draws, schedule=schedule)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_no_condition():
    config = TwinFlowConfig(enhanced_ratio=0.0)
    student = ToyNet(DIM, cond=0)
    latents = torch.randn(8, DIM)
    out = TwinFlowLoss(config)(student, latents, teacher=StudentTeacher(student))
    out.loss.backward()
    assert torch.isfinite(out.loss)


def test_an_unconditional_condition_of_none_is_missing():
    """None is no condition, so guidance cannot be asked for with it."""
    student = ToyNet(DIM, COND)
    latents, cond, _ = toy_batch(8)
    with pytest.raises(ValueError, match="uncond must be given"):
        TwinFlowLoss(TwinFlowConfig())(student, latents, cond, None, teacher=StudentTeacher(student))


def calls_of(student, cond, uncond, latents, **more):
    config = TwinFlowConfig()
    student.calls.clear()
    draws = toy_draws(config, latents, ("e2e", "mul", "any", "adv"))
    out = TwinFlowLoss(config)(student, latents, cond, uncond, teacher=StudentTeacher(student), draws=draws, **more)
    assert torch.isfinite(out.loss)
    return len(student.calls)


@pytest.mark.parametrize("uncond, together", [
    (torch.zeros(4, 6, COND), True), (torch.zeros(1, 6, COND), True), (torch.zeros(4, 9, COND), False),
    (torch.zeros(1, 2, COND), False), (torch.zeros(4, 6, COND).double(), False),
], ids=["same", "broadcast", "longer", "broadcast shorter", "dtype"])  # fmt: skip
def test_unequal_text_lengths_take_two_calls(uncond, together):
    """samples, guidance (one call or two), two segments, student, rectify."""
    student = Reading(lambda c: text_of(c).float())
    latents = torch.randn(4, DIM)
    assert calls_of(student, torch.randn(4, 6, COND), uncond, latents) == 6 + (not together)


def test_other_leaves_that_differ_take_two_calls():
    student = Reading(lambda c: c["text"])
    latents, cond, uncond = toy_batch(4)
    assert calls_of(student, {"text": cond, "drop": False}, {"text": uncond, "drop": False}, latents) == 6
    assert calls_of(student, {"text": cond, "drop": False}, {"text": uncond, "drop": True}, latents) == 7
    assert {c["drop"] for c in student.given[-7:]} == {False, True}
    assert calls_of(student, {"text": cond}, {"text": uncond, "more": 1}, latents) == 7


def test_a_broadcast_uncond_equals_a_repeated_one():
    config = TwinFlowConfig()
    student = ToyNet(DIM, COND)
    latents, cond, uncond = toy_batch(8)
    draws = toy_draws(config, latents, EIGHT)
    for text in (uncond[:1], uncond[:1].expand(8, -1)):
        found = run(config, student, latents, cond, text, draws)
        expected = run(config, student, latents, cond, uncond[:1].repeat(8, 1), draws)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_conditions_are_never_written():
    """Not even by a network that writes into what it is given where rows are copies; leaves keep their version."""
    config = TwinFlowConfig()
    student = Reading(lambda c: c["text"][0])
    latents, cond, uncond = toy_batch(8)
    leaves = [latents, cond, uncond]
    before = [leaf.clone() for leaf in leaves]
    versions = [leaf._version for leaf in leaves]
    draws = toy_draws(config, latents, EIGHT)
    run(config, student, latents, {"text": (cond,)}, {"text": (uncond,)}, draws)
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
    assert versions == [leaf._version for leaf in leaves]


def test_the_condition_receives_gradients():
    """A trainable text encoder in front."""
    config = TwinFlowConfig()
    student = ToyNet(DIM, COND)
    latents, cond, uncond = toy_batch(8)
    cond.requires_grad_(True)
    uncond.requires_grad_(True)
    draws = toy_draws(config, latents, EIGHT)
    out = TwinFlowLoss(config)(student, latents, cond, uncond, teacher=StudentTeacher(student), draws=draws)
    out.loss.backward()
    assert (cond.grad.abs().sum(1) > 0).all() and uncond.grad is None


def test_latents_that_require_grad_are_data():
    config = TwinFlowConfig()
    student = ToyNet(DIM, COND)
    latents, cond, uncond = toy_batch(8)
    draws = toy_draws(config, latents, EIGHT)
    found = run(config, student, latents.clone().requires_grad_(True), cond, uncond, draws)
    expected = run(config, student, latents, cond, uncond, draws)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
