"""Whole training steps recorded from the published algorithm: the oracle."""

import pytest
import torch
from helpers.toy import GoldenNet, golden_cases, golden_config, golden_draws, make_teacher

from twinflow import EMATeacher, TwinFlowLoss

CASES = golden_cases()


@pytest.mark.parametrize("mode", ["planned", "published", "rows"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_steps(case, mode):
    """Loss to 1e-6, gradients to 1e-5 relative, teacher to 1e-7 over the steps in sequence."""
    net = GoldenNet(case["params"])
    teacher = make_teacher(net, case["config"]["ema_decay_rate"])
    criterion = TwinFlowLoss(golden_config(case))
    for step in case["steps"]:
        x, cond, uncond = (torch.tensor(step[name], dtype=torch.float64) for name in ("x", "cond", "uncond"))
        arguments = dict(teacher=teacher, draws=golden_draws(step))
        net.zero_grad()
        if mode == "rows":
            out = criterion.backward(net, x, cond, uncond, micro_batch=1, **arguments)
        else:
            out = criterion(net, x, cond, uncond, schedule=mode, **arguments)
            out.loss.backward()
        assert out.loss.item() == pytest.approx(step["loss"], rel=1e-6)
        for name, parameter in net.named_parameters():
            recorded = torch.tensor(step["grads"][name], dtype=torch.float64)
            error = (parameter.grad - recorded).norm() / recorded.norm()
            assert error < 1e-5, f"{name}: relative gradient error {error:.2e}"
        if isinstance(teacher, EMATeacher):
            assert teacher.current_decay == pytest.approx(step["decay_next"], abs=1e-12)
            for name, value in teacher.parameters().items():
                recorded = torch.tensor(step["teacher_params"][name], dtype=torch.float64)
                torch.testing.assert_close(value, recorded, rtol=0, atol=1e-7)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= case["lr"] * parameter.grad
