"""Inputs of `velocity_loss`, its plain form row by row, and the comparison of a backend with it."""

import importlib
import math

import torch
from helpers.kernel_checks import assert_accurate, backends

from twinflow_kernels import _backend, velocity_loss

kernel = importlib.import_module("twinflow_kernels.velocity_loss")  # the package's attribute is the function
BACKENDS = backends(kernel._operation)
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
    """Equations 13 to 22 of docs/method.md row after row, with the explicit target sg(F - R) and autograd."""
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
        scale = wanted.abs().max().clamp_min(1e-30) if wanted.numel() else 1.0
        torch.testing.assert_close(result.double() / scale, wanted / scale, rtol=0, atol=TOLERANCE[result.dtype])
    return actual


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
