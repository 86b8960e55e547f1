"""Batches, draws and steps of the toy network for the objective's tests."""

from dataclasses import fields, replace

import torch
from helpers.toy import ToyNet, make_teacher

from twinflow import Draws, TwinFlowConfig, TwinFlowLoss
from twinflow.objective.draws import draw_step

DIM, COND = 5, 3
FOUR = ("e2e", "mul", "any", "adv")
EIGHT = ("e2e", "mul", "any", "adv", "any", "mul", "adv", "e2e")
# How ranks are started. A fork needs no imports; where CUDA is, autograd has threads of its own that do not come along.
STARTED = "spawn" if torch.cuda.is_available() else "fork"
TEACHERS = {"student": 0, "ema": 0.9, "frozen": 1}


def toy_batch(batch, dtype=torch.float32):
    """Latents, cond and uncond."""
    x = torch.randn(batch, DIM, dtype=dtype)
    return x, torch.randn(batch, COND, dtype=dtype), torch.randn(batch, COND, dtype=dtype)


def toy_draws(config: TwinFlowConfig, latents, roles=None) -> Draws:
    """Draws with given roles; float64 times for float64 latents."""
    draws = draw_step(config, latents, roles, None, 0)
    if latents.dtype != torch.float64:
        return draws
    again = None if draws.t_rectify is None else draws.t_rectify.double()
    return replace(draws, t=draws.t.double(), r=draws.r.double(), t_rectify=again)


def rows_of(draws, start, stop):
    """The draws of some rows."""
    if draws.roles is None:
        return Draws(**{f.name: v if (v := getattr(draws, f.name)) is None else v[start:stop] for f in fields(draws)})
    before = {role: sum(r == role for r in draws.roles[:start]) for role in ("e2e", "adv")}
    until = {role: sum(r == role for r in draws.roles[:stop]) for role in ("e2e", "adv")}
    e2e, adv = (slice(before[role], until[role]) for role in ("e2e", "adv"))
    return Draws(draws.roles[start:stop], draws.t[start:stop], draws.r[start:stop], draws.z[start:stop],
                 z_fake=draws.z_fake[adv], z_rectify=draws.z_rectify[e2e], t_rectify=draws.t_rectify[e2e])  # fmt: skip


def with_times(draws: Draws, t, r) -> Draws:
    return replace(draws, t=torch.tensor(t, dtype=draws.t.dtype), r=torch.tensor(r, dtype=draws.r.dtype))


def trained_pair(kind: str, dtype=torch.float32, **net):
    """A student that has moved away from its teacher (`student`, `ema` or `frozen`)."""
    student = ToyNet(DIM, COND, dtype=dtype, **net)
    teacher = make_teacher(student, TEACHERS[kind])
    move(student)
    if kind == "ema":
        teacher.update()
        move(student)
    return student, teacher


@torch.no_grad()
def move(module, scale=0.1):
    """The module, its trained weights changed as by an optimizer."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter += scale * torch.randn_like(parameter)
    return module


def gradients(module):
    """Name -> gradient (zero where there is none), cleared from the module."""
    found = {}
    for name, parameter in module.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return found


def step(config, student, teacher, batch, draws, **more):
    """(loss, gradients) of one step that leaves the teacher as it is."""
    out = TwinFlowLoss(config)(student, *batch, teacher=teacher, draws=draws, update_teacher=False, **more)
    if out.loss.requires_grad:
        out.loss.backward()
    return out.loss.detach(), gradients(student)


def backward(config, student, teacher, batch, draws, **more):
    """(loss, gradients) of one step by micro-batches."""
    out = TwinFlowLoss(config).backward(student, *batch, teacher=teacher, draws=draws, update_teacher=False, **more)
    return out.loss, gradients(student)


def assert_same(a, b):
    """Bit equality of two (loss, gradients)."""
    assert torch.equal(a[0], b[0]), f"loss {a[0].item()!r} and {b[0].item()!r}"
    for name, value in a[1].items():
        assert torch.equal(value, b[1][name]), f"{name}: {(value - b[1][name]).abs().max():.1e}"


def assert_close(a, b, tolerance=1e-6):
    """Two (loss, gradients) agree relative to their size."""
    assert abs(a[0] - b[0]) <= tolerance * abs(b[0]) + 1e-30, f"loss {a[0].item()!r} and {b[0].item()!r}"
    size = torch.stack([value.norm() for value in b[1].values()]).norm()
    for name, value in a[1].items():
        error = (value - b[1][name]).norm()
        assert error <= tolerance * size, f"{name}: gradient differs by {error:.1e} of {size:.1e}"
