"""Devices without kernels of ours (mps, xpu, npu): plain PyTorch serves them, without float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twinflow_kernels import _registry

PROGRAM = """
import torch
from helpers.other_device import held, moved
import twinflow_kernels as kernels
from twinflow_kernels.time_features import time_features_ref


def run(place):
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: place(torch.randn(*shape, generator=g))
    results = [*kernels.rollout_start(new(2, 3), new(2, 3), new(2, 3), new(2, 3), new(2), new(2))]
    results.append(kernels.rollout_step_(new(2, 3), new(2, 3), new(2)))
    v_pred = new(2, 3).requires_grad_()
    loss = kernels.velocity_loss(v_pred, new(2, 3), new(2, 3), new(2, 3), place(torch.ones(2, 4)))
    (grad,) = torch.autograd.grad(loss, v_pred, place(torch.ones(2)))
    targets = [new(2, 3), new(4)]
    kernels.ema_update_(targets, [new(2, 3), new(4)], 0.9)
    t, r = place(torch.tensor([0.3, -0.7])), place(torch.tensor([0.1, -0.7]))
    features = torch.ops.twinflow.time_features(t, r, True, 8, True, 0.0, 1000.0)
    return [held(x) for x in (*results, loss, grad, *targets, features)]


for expected, found in zip(run(lambda x: x), run(moved), strict=True):
    torch.testing.assert_close(found, expected)
print("the same")
"""


@pytest.mark.parametrize("operation", _registry.operations(), ids=lambda operation: operation.name)
@pytest.mark.parametrize("key", ["MPS", "XPU", "HPU", "PrivateUse1"])
def test_every_operation_has_a_form_for_every_device(operation, key):
    name = f"twinflow::{operation.name}"
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key)
    assert operation.choice({"PrivateUse1": "npu"}.get(key, key.lower())).backend == "reference"


def test_a_device_that_is_none_of_ours_and_has_no_float64():
    tests = Path(__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "the same", done.stderr[-2000:]
