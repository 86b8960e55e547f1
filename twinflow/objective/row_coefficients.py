"""`RowCoefficients`: the numbers per row that enter the arithmetic of a step, made on the host in float64."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.draws import Draws
from twinflow.objective.plan import Plan


@dataclass(frozen=True)
class RowCoefficients:
    """Numbers per row; all tensors have B rows, and the rows of a `coefficients` tensor are velocity_loss's `rows`.

    Args:
        noise: |t|, the share of noise in x_t.
        rectify_noise: t', the share of noise in a re-noised sample; 0 for rows without one.
        ratio: guidance of the enhanced target, 0 for rows that are not enhanced.
        delta: first step of the rollout, 0 for rows without one.
        main, velocity, fake_velocity, rectify, consistency: (B, 4) coefficients of each loss.
    """

    noise: torch.Tensor
    rectify_noise: torch.Tensor
    ratio: torch.Tensor
    delta: torch.Tensor
    main: torch.Tensor
    velocity: torch.Tensor
    fake_velocity: torch.Tensor
    rectify: torch.Tensor
    consistency: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "RowCoefficients":
        """The table on a device, in one transfer."""
        columns = [v.unsqueeze(-1) if v.dim() == 1 else v for v in vars(self).values()]
        packed = torch.cat(columns, dim=1).to(dtype).to(device, non_blocking=True)
        parts = packed.split([c.shape[1] for c in columns], dim=1)
        unpacked = [
            p.squeeze(1) if v.dim() == 1 else p.contiguous() for p, v in zip(parts, vars(self).values(), strict=True)
        ]
        return RowCoefficients(*unpacked)


def time_weight(t: float, r: float) -> float:
    """tan((1 - (|t| - |r|)) pi / 2.5) + 1 (docs/method.md, equation 19)."""
    return math.tan((1 - (abs(t) - abs(r))) * math.pi / 2.5) + 1


def denominators(config: TwinFlowConfig, plan: Plan, counts: Mapping[str, float], step_rows: int | None) -> tuple:
    """The rows that the main and the rectify means run over (docs/method.md, equation 23).

    Args:
        config, plan: the step.
        counts: role -> rows of the whole step that this process answers for; the batch's own for a whole step.
        step_rows: rows of the step of which this batch is a part; None: the batch is the step.
    """
    if config.recipe == "all_terms":
        rows = float(step_rows or plan.batch)
        return rows, rows
    if step_rows is not None:
        counts = {role: share * step_rows for role, share in config.active_shares().items()}
    counted = [r for r in counts if config.estimate_order > 0 or r in ("mul", "adv")]
    return sum(counts[r] for r in counted), counts.get("e2e", 0.0)


def row_coefficients(
    config: TwinFlowConfig, draws: Draws, plan: Plan, counts: Mapping[str, float], step_rows: int | None
) -> RowCoefficients:
    """Builds the table of a step; arguments as in `denominators`."""
    t, r = draws.t.double().tolist(), draws.r.double().tolist()
    roles = draws.roles or ("all",) * len(t)
    rows, delta, clamp = range(len(t)), config.delta_t, config.clamp
    main_rows, rectify_rows = denominators(config, plan, counts, step_rows)
    main = []
    for i in rows:
        factor = 1.0 / main_rows if main_rows else 0.0
        if roles[i] == "adv":
            main.append((1.0, 0.0, math.inf, config.adversarial_weight * factor))
            continue
        if config.time_weight:
            factor *= time_weight(t[i], r[i])
        if config.estimate_order == 0:
            main.append((1.0, 0.0, math.inf, factor if roles[i] == "mul" else 0.0))
        elif i in plan.rollout_rows:
            main.append(((t[i] - r[i]) / delta, 1.0 / delta, clamp, factor))
        else:
            main.append((1.0, 0.0, clamp, factor))
    rectified = [i for i in rows if roles[i] in ("e2e", "all")]
    again = [] if draws.t_rectify is None else draws.t_rectify.double().tolist()
    noise_again = dict(zip(rectified, again, strict=bool(again)))
    rectify_weight = config.rectify_weight / rectify_rows if rectify_rows else 0.0
    rectify = [(0.0, -1.0, _rectify_clamp(config), rectify_weight if i in noise_again else 0.0) for i in rows]
    generated = (1.0 / delta, 1.0 / delta) if delta < 1 else (1.0, 0.0)

    def every(a: float, b: float, bound: float, weight: float) -> torch.Tensor:
        return torch.tensor([(a, b, bound, weight / main_rows if main_rows else 0.0)] * len(t), dtype=torch.float64)

    return RowCoefficients(
        noise=draws.t.double().abs(),
        rectify_noise=torch.tensor([noise_again.get(i, 0.0) for i in rows], dtype=torch.float64),
        ratio=torch.tensor([config.enhanced_ratio * (i in plan.enhanced) for i in rows], dtype=torch.float64),
        delta=torch.tensor([delta * (i in plan.rollout_rows) for i in rows], dtype=torch.float64),
        main=torch.tensor(main, dtype=torch.float64),
        velocity=every(1.0, 0.0, math.inf, config.real_velocity_weight),
        fake_velocity=every(1.0, 0.0, math.inf, config.adversarial_weight),
        rectify=torch.tensor(rectify, dtype=torch.float64),
        consistency=every(*generated, clamp, config.consistency_weight),
    )


def _rectify_clamp(config: TwinFlowConfig) -> float:
    """`all_terms` leaves the rectify residual unclamped (docs/method.md, equation 27)."""
    return math.inf if config.recipe == "all_terms" else config.clamp
