"""Prompts of unequal length: what the stock transformers compute with a dense mask, without one."""

import pytest
import torch
from helpers.family_batches import (
    FAMILIES,
    MASKED,
    attention_masks,
    make_batch,
    make_condition,
    make_student,
    relative,
    stock_velocity,
)
from helpers.tiny_pipelines import tiny_transformer

LENGTHS = torch.tensor([5, 9, 1, 5])
TIMES = torch.tensor([0.9, 0.31, 0.5, 0.02])


def unequal(family, student):
    """A batch whose padding is far from zero, and its mask."""
    x, cond, _ = make_batch(family, student, 4)
    cond = make_condition(student, 4, tokens=9)
    mask = torch.arange(9) < LENGTHS[:, None]
    cond["prompt_embeds"][~mask] = 30.0
    return x, cond, mask


@pytest.mark.parametrize("how", ["lengths", "mask", "integer mask"])
@pytest.mark.parametrize("family", MASKED)
def test_unequal_prompts_are_the_stock_transformers_dense_mask(family, how):
    student = make_student(family)
    x, cond, mask = unequal(family, student)
    given = {"lengths": {"prompt_lengths": LENGTHS}, "mask": {"prompt_mask": mask},
             "integer mask": {"prompt_mask": mask.long()}}[how]  # fmt: skip
    expected = stock_velocity(family, student.transformer, x, TIMES, cond, mask)
    found = student(x, TIMES, TIMES, cond | given)
    assert relative(found, expected) < 1e-5
    assert relative(student(x, TIMES, TIMES, cond), expected) > 1e-2, "the padding must matter"


@pytest.mark.parametrize("family", MASKED)
@torch.no_grad()
def test_unequal_prompts_in_any_order(family):
    student = make_student(family)
    x, cond, _ = unequal(family, student)
    expected = student(x, TIMES, TIMES, cond | {"prompt_lengths": LENGTHS})
    for order in ([3, 1, 0, 2], [2, 3, 1, 0], [0, 0, 1, 1]):
        moved = {name: leaf[order] for name, leaf in (cond | {"prompt_lengths": LENGTHS}).items()}
        found = student(x[order], TIMES[order], TIMES[order], moved)
        assert relative(found, expected[order]) < 1e-5


@pytest.mark.parametrize("family", MASKED)
def test_gradients_of_unequal_prompts_are_those_of_single_rows(family):
    student = make_student(family)
    x, cond, _ = unequal(family, student)
    cond["prompt_lengths"] = LENGTHS
    target = torch.randn_like(x)

    def gradients(rows):
        x_t = x.clone().requires_grad_()
        for row in rows:
            velocity = student(x_t[row], TIMES[row], TIMES[row], {name: leaf[row] for name, leaf in cond.items()})
            (velocity * target[row]).sum().backward()
        found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        student.zero_grad()
        return found | {"x_t": x_t.grad}

    whole, single = gradients([slice(None)]), gradients([slice(k, k + 1) for k in range(4)])
    assert whole.keys() == single.keys() and len(whole) > 20
    size = torch.stack([value.norm() for value in single.values()]).max()
    for name, value in whole.items():
        assert (value - single[name]).norm() < 1e-5 * size, name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_ever_reaches_attention(family):
    """Prompts of equal and unequal length, with and without gradient: nothing that rules out flash attention."""
    student = make_student(family, "dual+sign")
    x, cond, mask = unequal(family, student)
    for given in ({}, {"prompt_lengths": LENGTHS}, {"prompt_mask": mask}):
        with attention_masks() as masks:
            student(x, TIMES, TIMES / 2, cond | given).sum().backward()
            with torch.no_grad():
                student(x[:1], TIMES[:1], TIMES[:1], {k: v[:1] for k, v in (cond | given).items()})
        assert masks and all(found is None for found in masks)
    if family in MASKED:
        with attention_masks() as masks:  # so that the record can show a mask
            stock_velocity(family, tiny_transformer(family), x, TIMES, cond, mask if family != "z_image" else None)
            if family == "z_image":
                long = torch.arange(40) < torch.tensor([[40], [5], [5], [5]])
                many = make_condition(student, 4, tokens=40)
                stock_velocity(family, tiny_transformer(family), x, TIMES, many, long)
        assert any(found is not None for found in masks)


@torch.no_grad()
def test_z_image_prompts_of_one_padded_length_are_one_call():
    """Its transformer pads captions to 32: lengths within one multiple go together, others apart."""
    student = make_student("z_image")
    x = make_batch("z_image", student, 4)[0]
    cond = make_condition(student, 4, tokens=70)
    calls = []
    student.transformer.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    for lengths, expected in (([1, 32, 7, 20], [4]), ([32, 33, 64, 65], [1, 2, 1])):
        calls.clear()
        mask = torch.arange(70) < torch.tensor(lengths)[:, None]
        found = student(x, TIMES, TIMES, cond | {"prompt_lengths": torch.tensor(lengths)})
        assert calls == expected
        assert relative(found, stock_velocity("z_image", student.transformer, x, TIMES, cond, mask)) < 1e-5


@pytest.mark.parametrize("match, given", [
    ("prompt_mask: valid tokens must come first, got gaps in rows \\[1\\]", dict(prompt_mask=[[1, 1, 0], [1, 0, 1]])),
    ("prompt_mask: valid tokens must come first, got gaps in rows \\[0\\]", dict(prompt_mask=[[0, 1, 1], [1, 1, 1]])),
    ("prompt_lengths must be in 1 .. 3, got 0", dict(prompt_mask=[[1, 1, 1], [0, 0, 0]])),
    ("prompt_lengths must be in 1 .. 3, got 0", dict(prompt_lengths=[3, 0])),
    ("prompt_lengths must be in 1 .. 3, got -1", dict(prompt_lengths=[-1, 3])),
    ("prompt_lengths must be in 1 .. 3, got 4", dict(prompt_lengths=[4, 3])),
    (r"prompt_mask must be of shape \(2, 3\), got \(2, 4\)", dict(prompt_mask=[[1, 1, 1, 1]] * 2)),
    (r"prompt_mask must be of shape \(2, 3\), got \(3,\)", dict(prompt_mask=[1, 1, 1])),
    (r"prompt_lengths must be 2 integers, got torch.int64 of shape \(3,\)", dict(prompt_lengths=[1, 1, 1])),
    (r"prompt_lengths must be 2 integers, got torch.float32 of shape \(2,\)", dict(prompt_lengths=[1.0, 2.0])),
    (r"prompt_lengths must be 2 integers, got torch.bool of shape \(2,\)", dict(prompt_lengths=[True, True])),
])  # fmt: skip
@pytest.mark.parametrize("family", MASKED)
def test_bad_lengths_and_masks(family, match, given):
    student = make_student(family)
    x, cond = make_batch(family, student, 2)[0], make_condition(student, 2, tokens=3)
    with pytest.raises(ValueError, match=match):
        student(x, TIMES[:2], TIMES[:2], cond | {name: torch.tensor(value) for name, value in given.items()})
