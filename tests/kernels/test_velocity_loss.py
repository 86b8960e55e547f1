"""`velocity_loss`: every backend against the reference in float64, contracts, errors."""

import importlib
import math

import pytest
import torch
from room import DTYPES, ROW_SIZES, assert_accurate, lanes

from twinflow_kernels import _backend, velocity_loss

room = importlib.import_module("twinflow_kernels.velocity_loss")  # the package's attribute is the function
LANES = lanes(room._operation)
INF = math.inf
# scale_pred, scale_path, clamp, weight: rollout, empty rollout, fake velocity, rectify, order 0, not counted
ROWS = [[50, 100, 1, 1.5], [1, 0, 1, 0.7], [1, 0, INF, 1], [0, -1, 1, 0.5], [1, 0, INF, 2], [1, 1, 1, 0]]


def inputs(shape=(6, 64), dtypes=(torch.float32,) * 4, device="cpu", rows=None, target=True, path=True):
    v_pred, v_target, x_start, x_end = (torch.randn(shape, device=device).to(dtype) for dtype in dtypes)
    rows = torch.tensor((ROWS * shape[0])[: shape[0]] if rows is None else rows, dtype=torch.float32, device=device)
    rows = rows.reshape(-1, 4)
    x_end = x_start + 0.01 * x_end.to(x_start.dtype) if path else None
    return v_pred.requires_grad_(), v_target if target else None, x_start if path else None, x_end, rows


def converted(arguments, dtype):
    return [None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad) for x in arguments]


def plain_loss(v_pred, v_target, x_start, x_end, rows, loss="barron", alpha=1.0, c=1e-3):
    """METHOD 2.5-2.8 as a user writes it, one row after another, with the explicit target sg(F - R) and autograd."""
    losses = []
    for i, (a, b, clamp, weight) in enumerate(rows.tolist()):
        v = v_pred[i].to(torch.promote_types(v_pred.dtype, torch.float32))
        with torch.no_grad():
            residual = a * v
            if x_start is not None:
                residual = residual - b * (x_start[i].to(v.dtype) - x_end[i].to(v.dtype))
            if v_target is not None:
                residual = residual - v_target[i]
            target = v - residual.clamp(-clamp, clamp)
        mse = (v - target).square().mean()
        barron = 1.0
        if loss == "barron" and abs(alpha - 2) >= 1e-5:
            barron = ((mse / (c**2 + 1e-8) / abs(alpha - 2) + 1) ** ((alpha - 2) / 2)).detach()
        losses.append(weight * mse * barron / (c if loss == "barron" else 1))
    return torch.stack(losses) if losses else v_pred.sum() * torch.zeros(0, dtype=v_pred.dtype)


def both(function, arguments, grad_loss=None, **options):
    """(losses, gradient of v_pred) for per-row upstream gradients."""
    losses = function(*arguments, **options)
    grad_loss = torch.ones_like(losses) if grad_loss is None else grad_loss.to(losses)
    return losses.detach(), torch.autograd.grad(losses, arguments[0], grad_loss)[0]


def check(arguments, backend, grad_loss=None, **options):
    exact = both(plain_loss, converted(arguments, torch.float64), grad_loss, **options)
    with _backend.override("reference"):
        reference = both(velocity_loss, arguments, grad_loss, **options)
    with _backend.override(backend):
        actual = both(velocity_loss, arguments, grad_loss, **options)
        again = both(velocity_loss, arguments, grad_loss, **options)
    assert actual[1].dtype == arguments[0].dtype
    for result, twice, wanted, plain in zip(actual, again, exact, reference, strict=True):
        assert torch.equal(result, twice)
        if result.dtype != torch.float64:  # there the exact result is no better than the others
            assert_accurate(result, wanted, plain, backend)
        # The gradient of a large row is about 1 / row_size: compare it at its own scale as well.
        scale = wanted.abs().amax().clamp_min(1e-30)
        torch.testing.assert_close(result.double() / scale, wanted / scale, rtol=0, atol=TOLERANCE[result.dtype])
    return actual


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("backend, device", LANES)
@pytest.mark.parametrize("row_size", [*ROW_SIZES, 4096, 8192, 20_000])
def test_row_sizes(backend, device, row_size):
    check(inputs((6, row_size), device=device), backend)


@pytest.mark.parametrize("backend, device", LANES)
@pytest.mark.parametrize("state", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("v_dtype", [*DTYPES, torch.float64])
def test_dtypes(backend, device, v_dtype, state):
    losses, _ = check(inputs((6, 129), (v_dtype, state, torch.float32, torch.float32), device), backend)
    assert losses.dtype == (torch.float64 if torch.float64 in (v_dtype, state) else torch.float32)
    check(inputs((6, 129), (torch.float32, torch.float16, state, v_dtype), device), backend)


@pytest.mark.parametrize("backend, device", LANES)
@pytest.mark.parametrize("options", [{"loss": "l2"}, *({"alpha": a, "c": c} for a in (2, 1, 0.0, -2, 2.5, 2 + 1e-6)
                                                      for c in (1e-3, 0.3))])  # fmt: skip
@pytest.mark.parametrize("target, path", [(True, True), (False, True), (True, False), (False, False)])
def test_losses(backend, device, options, target, path):
    arguments = inputs((7, 300), device=device, target=target, path=path)
    check(arguments, backend, grad_loss=torch.rand(7, device=device), **options)
