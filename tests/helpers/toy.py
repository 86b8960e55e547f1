"""Batch-invariant toy networks and recorded steps for the objective's tests."""

import gzip
import json
from pathlib import Path

import torch
from torch import nn

from twinflow import Draws, EMATeacher, FrozenTeacher, StudentTeacher, TwinFlowConfig

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden_steps.json.gz"


class RowwiseLinear(nn.Module):
    """A linear layer whose rows do not depend on the batch they are in: a product and a sum per row, no GEMM."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, dtype=dtype) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.unsqueeze(1) * self.weight).sum(-1) + self.bias


class ToyNet(nn.Module):
    """F(x_t, t, r, cond) on (B, D) latents; sees signed times; counts its calls and rows."""

    def __init__(self, dim: int = 5, cond: int = 3, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = RowwiseLinear(dim + 2 + cond, 16, dtype)
        self.second = RowwiseLinear(16, dim, dtype)
        self.dropout = nn.Dropout(dropout)
        self.calls: list[tuple[int, bool]] = []

    def forward(self, x_t, t, r, cond):
        self.calls.append((x_t.shape[0], torch.is_grad_enabled()))
        times = torch.stack([t, r], 1).to(x_t.dtype)
        columns = [x_t, times] if cond is None else [x_t, times, cond]
        return self.second(self.dropout(torch.tanh(self.first(torch.cat(columns, 1))))) + x_t


class GoldenNet(nn.Module):
    """The network of the recorded steps."""

    def __init__(self, params: dict) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))

    def forward(self, x_t, t, r, cond):
        x = torch.cat([x_t, t[:, None], r[:, None], cond], 1)
        return torch.tanh(x @ self.W1.T + self.b1) @ self.W2.T + self.b2 + x_t * self.s


def golden_cases() -> list[dict]:
    with gzip.open(GOLDEN, "rt") as file:
        return json.load(file)["cases"]


def golden_config(case: dict) -> TwinFlowConfig:
    """The recorded names of the published code as ours."""
    recorded = case["config"]
    more = {"rectify_weight": recorded["dist_match_cof"]} if "dist_match_cof" in recorded else {}
    loss = recorded.get("loss_func_type", {}).get("type")
    return TwinFlowConfig(
        recipe=case["recipe"], estimate_order=recorded["estimate_order"], enhanced_ratio=recorded["enhanced_ratio"],
        loss=loss, data_free=recorded.get("use_image_free", False), **more,
    )  # fmt: skip


def golden_draws(step: dict) -> Draws:
    def tensor(name):
        return torch.tensor(step[name], dtype=torch.float64) if name in step else None

    return Draws(
        roles=tuple(step["roles"]) if "roles" in step else None, t=tensor("t"), r=tensor("t_target"), z=tensor("z"),
        z_fake=tensor("z_fake"), z_data=tensor("z_data"), z_rectify=tensor("z_rectify"),
        t_rectify=tensor("t_rectify"),
    )  # fmt: skip


def make_teacher(student, decay: float):
    if decay == 0:
        return StudentTeacher(student)
    return FrozenTeacher(student) if decay == 1 else EMATeacher(student, decay)
