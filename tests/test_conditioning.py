"""Time conditioning on the real transformer classes, in every mode: what is added to a network and what it is told."""

import copy

import pytest
import torch
from helpers.family_batches import FAMILIES, features, make_batch, make_condition, make_student, randomised, relative
from helpers.tiny_pipelines import tiny_transformer

from twinflow.conditioning import MODES
from twinflow.models import load

T = torch.tensor([0.9, 0.31, 0.5, 1.0])
SECOND = {"sana": "time_embed_2.emb.timestep_embedder", "z_image": "t_embedder_2.mlp"}


def trained(student, batch, steps=1):
    """One optimizer step towards other targets at the real, the fake and the mean velocity."""
    x, cond, _ = batch
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(steps):
        loss = sum((student(x, t, r, cond) - x * w).square().mean()
                   for t, r, w in ((T, T, 1), (-T, -T, -1), (T, T / 2, 0.5)))  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


# At initialisation.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_nothing_changes_at_first(family, mode):
    """To float32 rounding of the features: at every (t, r), in the midpoint modes at r = 0."""
    plain, student = make_student(family), make_student(family, mode)
    x, cond, _ = make_batch(family, plain, 4)
    targets = (T * 0,) if "midpoint" in mode else (T, T * 0, T * 0.3)
    for t, r in ((sign * T, sign * target) for sign in (1, -1) for target in targets):
        expected = plain(x, t.abs() if "sign" in mode else t, t, cond)
        assert relative(student(x, t, r, cond), expected) < 5e-5
    assert relative(plain(x, T * 0.99, T, cond), plain(x, T, T, cond)) > 1e-3, "the time must matter"


@pytest.mark.parametrize("family, changes", [("sana", dict(timestep_scale=0.05)), ("z_image", dict(t_scale=60.0))])
@torch.no_grad()
def test_the_scale_of_a_transformers_own_time(family, changes):
    plain = load(tiny_transformer(family, **changes))
    student = load(tiny_transformer(family, **changes), conditioning="dual+sign")
    x, cond, _ = make_batch(family, plain, 4)
    assert relative(student(x, T, T / 2, cond), plain(x, T, T, cond)) < 5e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_dtypes_of_what_is_added(family, mode):
    """The names of published checkpoints; float32 on a bf16 model; all of it in the transformer's own state."""
    student = make_student(family, mode, torch.bfloat16)
    second = SECOND.get(family, "time_text_embed_2.timestep_embedder")
    layers = ("0", "2") if family == "z_image" else ("linear_1", "linear_2")
    expected = (
        {f"{second}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} if "dual" in mode else set()
    )
    expected |= {"time_sign_embed.weight"} if "sign" in mode else set()
    plain = tiny_transformer(family)
    known = {name for name, _ in plain.named_parameters()}
    added = {n: p for n, p in student.transformer.named_parameters() if n not in known}
    assert added.keys() == expected == student.transformer.state_dict().keys() - plain.state_dict().keys()
    assert {id(p) for p in added.values()} == {id(p) for p in student.conditioning.parameters()}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in added.values())
    if "sign" in mode:
        assert not added["time_sign_embed.weight"].any() and added["time_sign_embed.weight"].shape[0] == 2


# What the network is told.


def expected_embedding(family, student, t, r):
    """docs/method.md, equations 29 to 31, written out in float64."""
    mode, conditioning = student.conditioning.mode, student.conditioning
    path = student.time_embedder().path
    first = tiny_transformer(family).get_submodule(path).double()
    asked, target = (t - r / 2 if "midpoint" in mode else t).double(), r.double()
    row = 0
    if "sign" in mode:
        row = (t < 0).double()[:, None] * conditioning.table.weight[1].double()
        asked, target = asked.abs(), target.abs()
    out = first(features(1 - asked if family == "z_image" else asked, 1000)) + row
    if "dual" in mode:
        second = copy.deepcopy(conditioning.second).double()
        told = asked - target if family == "z_image" else target
        out = out + second(features(told, 1000)) * (asked - target)[:, None]
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_embedding_is_the_documented_one(family, mode):
    student = randomised(make_student(family, mode))
    found = []
    student.transformer.get_submodule(student.time_embedder().path).register_forward_hook(
        lambda _module, _args, out: found.append(out)
    )
    cases = [(T, T), (T, T * 0), (T, T * 0.3), (-T, -T), (-T, -T * 0.3), (torch.zeros(4), torch.zeros(4))]
    for t, r in cases:
        found.clear()
        student(*make_batch(family, student, 4)[:1], t, r, make_condition(student, 4))
        torch.testing.assert_close(found[0].double(), expected_embedding(family, student, t, r), rtol=0, atol=1e-4)
    assert len(found) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_times_are_told_in_float32_in_a_bfloat16_model(family, mode):
    """0.9905 and 0.993 are one number in bfloat16."""
    student = randomised(make_student(family, mode, torch.bfloat16))
    near, t = torch.tensor([0.9905]), torch.tensor([0.993])
    assert near.bfloat16() == t.bfloat16()
    x, cond, _ = make_batch(family, student, 1, torch.bfloat16)
    r = t * 0.5
    expected = student(x, t, r, cond)
    assert not torch.equal(student(x, near, r, cond), expected)
    seen = []
    student.transformer.get_submodule(student.time_embedder().path).register_forward_hook(
        lambda _module, args, _out: seen.append(args[0])
    )
    student(x, t, r, cond)
    asked = t - r / 2 if "midpoint" in mode else t
    exact = features(1 - asked.double() if family == "z_image" else asked, 1000)
    assert seen[0].dtype == torch.bfloat16 and torch.equal(seen[0], exact.float().bfloat16())
    if mode != "sign":
        nearer = torch.tensor([0.4962])
        assert nearer.bfloat16() == r.bfloat16() and not torch.equal(student(x, t, nearer, cond), expected)


# After an optimizer step.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_tells_after_one_optimizer_step(family, mode):
    """The target time where the mode tells it, and nowhere else; the fake trajectory always, near |t| = 1 too."""
    student = make_student(family, mode)
    batch = make_batch(family, student, 4)
    trained(student, batch)
    x, cond, _ = batch
    with torch.no_grad():
        at = {name: student(x, T, r, cond) for name, r in (("t", T), ("0", T * 0), ("half", T / 2))}
        fake, near, fake_near = (student(x, t, t, cond) for t in (-T, 0 * T + 0.999, 0 * T - 0.999))
    for a, b in (("t", "0"), ("t", "half"), ("0", "half")):
        assert torch.equal(at[a], at[b]) if mode == "sign" else relative(at[a], at[b]) > 1e-5, (a, b)
    for real, other in ((at["t"], fake), (near, fake_near)):
        difference = (real - other).flatten(1).norm(dim=1) / real.flatten(1).norm(dim=1)
        assert difference.min() > 1e-5, difference


@pytest.mark.parametrize("mode", [mode for mode in MODES if "dual" in mode])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_second_embedder_has_no_effect_at_r_equal_t(family, mode):
    """Exactly, whatever it has learned: the guidance query and plain flow matching stay the network's own."""
    student = make_student(family, mode)
    x, cond, _ = make_batch(family, student, 4)
    before = [student(x, t, r, cond) for t, r in ((T, T), (-T, -T), (T, T / 2))]
    for parameter in student.conditioning.second.parameters():
        parameter.normal_()
    after = [student(x, t, r, cond) for t, r in ((T, T), (-T, -T), (T, T / 2))]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False]


@pytest.mark.parametrize("mode", [mode for mode in MODES if "sign" in mode])
def test_the_row_of_positive_times_stays_zero(mode):
    """Through AdamW with weight decay; the other row learns."""
    student = make_student("sd3", mode)
    trained(student, make_batch("sd3", student, 4), steps=5)
    table = student.transformer.time_sign_embed.weight
    assert torch.equal(table[0], torch.zeros_like(table[0])) and table[1].abs().min() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_new_parameter(family, mode):
    """In the second step also the second embedder's first layer, which a zero layer follows at first."""
    student = make_student(family, mode)
    batch = make_batch(family, student, 4)
    for step in range(2):
        student.zero_grad()
        trained(student, batch)
        zero = {n for n, p in student.transformer.named_parameters() if p.grad is not None and not p.grad.any()}
        mine = {
            n for n, p in student.transformer.named_parameters() if n.partition(".")[0] in student.conditioning.names
        }
        assert all(p.grad is not None for p in student.conditioning.parameters())
        first_layer = {n for n in mine if ".linear_1." in n or ".mlp.0." in n}
        assert zero & mine == (first_layer if step == 0 else set())
