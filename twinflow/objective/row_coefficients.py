"""`RowCoefficients`: the numbers per row that enter the arithmetic of a step, made on the host in float64."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.draws import Draws
from twinflow.objective.plan import Plan

_PER_ROW = ("noise", "rectify_noise", "ratio", "delta")
_LOSSES = ("main", "velocity", "fake_velocity", "rectify", "consistency")


class RowCoefficients:
    """Numbers per row on the device of a step, views of one buffer that goes there in one transfer.

    Args:
        numbers: what `row_coefficients` made.
        device, dtype: where the latents are, and the dtype of the step's arithmetic.

    Attributes:
        noise: (B,) |t|, the share of noise in x_t.
        rectify_noise: (B,) t', the share of noise in a re-noised sample; 0 for rows without one.
        ratio: (B,) guidance of the enhanced target, 0 for rows that are not enhanced.
        delta: (B,) first step of the rollout, 0 for rows without one.
        main, velocity, fake_velocity, rectify, consistency: (B, 4) `rows` of velocity_loss for each loss; weight 0
            where the recipe has no such loss.
    """

    def __init__(self, numbers: np.ndarray, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        rows = numbers.size // (len(_PER_ROW) + 4 * len(_LOSSES))
        flat = torch.from_numpy(numbers).to(dtype).to(device, non_blocking=True)
        self.noise, self.rectify_noise, self.ratio, self.delta = flat[: 4 * rows].view(4, rows).unbind()
        losses = flat[4 * rows :].view(len(_LOSSES), rows, 4)
        self.main, self.velocity, self.fake_velocity, self.rectify, self.consistency = losses.unbind()


def denominators(
    config: TwinFlowConfig, plan: Plan, counts: Mapping[str, float], step_rows: int | None
) -> tuple[float, float]:
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
) -> np.ndarray:
    """The numbers of a step, float64: four per row, then four per row for each loss; arguments as in `denominators`."""
    t, r = draws.t.numpy().astype(np.float64), draws.r.numpy().astype(np.float64)
    rows, delta, clamp = len(t), config.delta_t, config.clamp
    main_rows, rectify_rows = denominators(config, plan, counts, step_rows)
    mean = 1.0 / main_rows if main_rows else 0.0
    numbers = np.zeros(rows * (len(_PER_ROW) + 4 * len(_LOSSES)))
    noise, rectify_noise, ratio, first_step = numbers[: 4 * rows].reshape(4, rows)
    main, velocity, fake_velocity, rectify, consistency = numbers[4 * rows :].reshape(len(_LOSSES), rows, 4)
    noise[:] = np.abs(t)
    ratio[[*plan.enhanced]] = config.enhanced_ratio
    rolled = [*plan.rollout_rows]
    first_step[rolled] = delta

    # scale_pred, scale_path, clamp and weight (equations 13 to 16 and 19)
    main[:] = (1.0, 0.0, clamp, mean)
    if config.time_weight:
        main[:, 3] = mean * (np.tan((1 - (noise - np.abs(r))) * (math.pi / 2.5)) + 1)
    if config.estimate_order == 0:
        main[:, 2] = math.inf
        main[:, 3] *= draws.mask("mul") if draws.roles is not None else 0.0
    main[rolled, 0] = (t[rolled] - r[rolled]) / delta
    main[rolled, 1] = 1.0 / delta
    # `all_terms` leaves the rectify residual unclamped (equation 27).
    rectify[:] = (0.0, -1.0, math.inf if config.recipe == "all_terms" else clamp, 0.0)
    if draws.t_rectify is not None:
        rectified = slice(None) if draws.roles is None else draws.mask("e2e")
        rectify_noise[rectified] = draws.t_rectify.numpy()
        rectify[rectified, 3] = config.rectify_weight / rectify_rows if rectify_rows else 0.0
    if draws.roles is not None:
        main[draws.mask("adv")] = (1.0, 0.0, math.inf, config.adversarial_weight * mean)
        return numbers
    velocity[:] = (1.0, 0.0, math.inf, config.real_velocity_weight * mean)
    fake_velocity[:] = (1.0, 0.0, math.inf, config.adversarial_weight * mean)
    scales = (1.0 / delta, 1.0 / delta) if delta < 1 else (1.0, 0.0)
    consistency[:] = (*scales, clamp, config.consistency_weight * mean)
    return numbers
