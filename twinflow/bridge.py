"""`DiffusionToFlowBridge`: reads epsilon- and v-prediction diffusion models as flow-matching models (diff2flow).

A diffusion model lives at x_d = a x0 + b eps with a = sqrt(abar), b = sqrt(1 - abar), a flow model at
x_f = (1 - sigma) x0 + sigma eps. With sigma = b / (a + b) they are one point, x_f = x_d / (a + b), and the same x0 and
eps belong to both: the velocity is eps - x0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.objective.flags import parse_flags
from twinflow_kernels._backend import widest

_NAMES = {
    "epsilon": "epsilon", "eps": "epsilon",
    "v_prediction": "v_prediction", "vpred": "v_prediction", "v": "v_prediction",
}  # fmt: skip
_NAME = "DiffusionToFlowBridge"
_FLOW_NAMES = ("flow_matching", "flow_prediction", "flow")


def prediction_name(prediction_type: object) -> str:
    """Returns `epsilon` or `v_prediction` for any accepted name of them.

    Raises:
        ValueError: another prediction type.
    """
    if not isinstance(prediction_type, str) or prediction_type not in _NAMES:
        raise ValueError(f"Unsupported prediction_type for diff2flow bridge: {prediction_type}")
    return _NAMES[prediction_type]


def require_bridge(prediction_type: str, options: Mapping[str, Any]) -> bool:
    """Returns whether a model needs the bridge, which its options must enable.

    Args:
        prediction_type: the model's, as its scheduler names it; `flow_matching`, `flow_prediction` or `flow` need none.
        options: `twinflow_*` and `diff2flow_*` options, or what `TwinFlowConfig.from_flags` leaves of them.

    Raises:
        ValueError: not both of `diff2flow_enabled` and `twinflow_allow_diff2flow`, or an unsupported prediction type.
    """
    if prediction_type in _FLOW_NAMES:
        return False
    _, options = parse_flags(options)
    if not (options["diff2flow_enabled"] and options["twinflow_allow_diff2flow"]):
        raise ValueError(
            "TwinFlow requires flow-matching prediction_type. Enable diff2flow_enabled and twinflow_allow_diff2flow to "
            "bridge epsilon/v_prediction models explicitly."
        )
    prediction_name(prediction_type)
    return True


class DiffusionToFlowBridge:
    """Translates between timesteps and sigma, and predictions to velocities; its table is float64.

    Values of times are checked where that waits for no device: on the CPU, outside torch.compile.

    Args:
        alphas_cumprod: abar of timesteps 0 .. T - 1, (T,), T >= 2, falling, in [0, 1), float32 or float64.

    Attributes:
        num_timesteps: T.
        sigma_range: sigma of the first and of the last timestep; times beyond them, 0 and 1 among them, were never
            trained (0.028 and 0.936 in Stable Diffusion 1.5).

    Raises:
        ValueError: alphas_cumprod is no tensor, or not such a table.

    Source: Diff2Flow (arXiv 2506.02221).
    """

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        if not isinstance(alphas_cumprod, torch.Tensor):
            raise ValueError("alphas_cumprod tensor is required to build a DiffusionToFlowBridge.")
        if alphas_cumprod.dtype not in (torch.float32, torch.float64):
            wanted = "float32 or float64, as half precision merges timesteps"
            raise ArgumentError(_NAME, "alphas_cumprod", wanted, alphas_cumprod.dtype)
        abar = alphas_cumprod.detach().to("cpu", torch.float64)
        if abar.dim() != 1 or len(abar) < 2:
            raise ArgumentError(_NAME, "alphas_cumprod", "of shape (T,) with T >= 2", tuple(abar.shape))
        if not (abar[0] < 1 and abar[-1] >= 0 and bool((abar[1:] < abar[:-1]).all())):
            ends = f"{abar[0].item()} .. {abar[-1].item()}"
            raise ArgumentError(_NAME, "alphas_cumprod", "falling and in [0, 1)", ends)
        a, b = abar.sqrt(), (1 - abar).sqrt()
        sigmas = b / (a + b)
        self._sigmas = {torch.device("cpu"): sigmas}
        self.num_timesteps = len(sigmas)
        self.sigma_range = (sigmas[0].item(), sigmas[-1].item())

    def timesteps_to_sigma(self, t: torch.Tensor, broadcast_shape: Sequence[int] | None = None) -> torch.Tensor:
        """The flow time of timesteps.

        Args:
            t: timesteps (B,) in [0, T - 1]; between integers sigma is interpolated.
            broadcast_shape: shape (B, ...) of what sigma will multiply.

        Returns:
            sigma (B,), float64; (B, 1, ...) with as many axes as `broadcast_shape`.

        Raises:
            ValueError: timesteps are absent or out of range, or the shapes disagree.
        """
        if t is None:
            raise ValueError("TwinFlow bridging requires timesteps for sigma computation.")
        if t.dim() != 1 or (broadcast_shape is not None and (not broadcast_shape or broadcast_shape[0] != len(t))):
            wanted = "(B,)" if broadcast_shape is None else f"the rows of {tuple(broadcast_shape)}"
            raise ArgumentError("timesteps_to_sigma", "t", wanted, f"shape {tuple(t.shape)}")
        last = self.num_timesteps - 1
        _require_within("timesteps_to_sigma", "t", t, 0, last)
        sigmas = self._table(t.device)
        if t.is_floating_point():
            below = t.to(sigmas.dtype).floor()
            index = below.long()
            sigma = torch.lerp(sigmas[index], sigmas[(index + 1).clamp(max=last)], t.to(sigmas.dtype) - below)
        else:
            sigma = sigmas[t.long()]
        return sigma if broadcast_shape is None else sigma.view(-1, *[1] * (len(broadcast_shape) - 1))

    def sigma_to_timesteps(self, sigma: torch.Tensor, *, interpolate: bool = False) -> torch.Tensor:
        """The timesteps of flow times; times beyond the table's ends get its ends.

        Args:
            sigma: (B,) or (B, 1, ...) floating, in [-1, 1]; a signed time counts by its magnitude.
            interpolate: return the fractional timestep instead of the nearest one.

        Returns:
            (B,) int64, the nearest in sigma and of two equally near the later; float64 with `interpolate`.

        Raises:
            TypeError: sigma is not floating.
            ValueError: it has other axes, or is out of range.
        """
        if not isinstance(sigma, torch.Tensor) or not sigma.is_floating_point():
            kind = sigma.dtype if isinstance(sigma, torch.Tensor) else type(sigma).__name__
            raise ArgumentTypeError("sigma_to_timesteps", "sigma", "a floating tensor", kind)
        if sigma.dim() < 1 or any(size != 1 for size in sigma.shape[1:]):
            raise ArgumentError("sigma_to_timesteps", "sigma", "(B,) or (B, 1, ...)", f"shape {tuple(sigma.shape)}")
        _require_within("sigma_to_timesteps", "sigma", sigma, -1, 1)
        sigmas = self._table(sigma.device)
        sigma = sigma.reshape(-1).abs().to(sigmas.dtype)
        above = torch.searchsorted(sigmas, sigma).clamp(1, self.num_timesteps - 1)
        low, high = sigmas[above - 1], sigmas[above]
        if interpolate:
            return above - 1 + ((sigma - low) / (high - low)).clamp(0, 1)
        return torch.where(high - sigma <= sigma - low, above, above - 1)

    def prediction_to_flow(
        self, pred: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, *, prediction_type: str
    ) -> torch.Tensor:
        """The velocity eps - x0 of a diffusion model's prediction.

        Args:
            pred: the prediction, (B, ...).
            x_t: what the model was given, the diffusion point a x0 + b eps, (B, ...).
            t: the timesteps it was given, (B,), integer or fractional.
            prediction_type: `epsilon` or `eps`; `v_prediction`, `vpred` or `v`.

        Returns:
            (B, ...), noise-ward, in the promoted dtype of `pred` and `x_t`, float32 or wider.

        Raises:
            ValueError: an unsupported prediction type, one that a table ending at abar = 0 rules out, absent
                timesteps, or shapes that disagree.
        """
        epsilon = prediction_name(prediction_type) == "epsilon"
        if pred.shape != x_t.shape:
            wanted = f"of x_t's shape {tuple(x_t.shape)}"
            raise ArgumentError("prediction_to_flow", "pred", wanted, tuple(pred.shape))
        self.check_prediction(prediction_type)
        sigma = self.timesteps_to_sigma(t, x_t.shape)
        norm = torch.hypot(1 - sigma, sigma)  # a = (1 - sigma) / norm, b = sigma / norm, a + b = 1 / norm
        # epsilon: x0 = (x_t - b eps) / a, so eps - x0 = ((a + b) eps - x_t) / a
        # v = a eps - b x0:                  eps - x0 = (a + b) v + (b - a) x_t
        pred_factor = 1 / (1 - sigma) if epsilon else 1 / norm
        x_t_factor = -norm / (1 - sigma) if epsilon else (2 * sigma - 1) / norm
        dtype = torch.promote_types(torch.promote_types(pred.dtype, x_t.dtype), torch.float32)
        return pred_factor.to(dtype) * pred + x_t_factor.to(dtype) * x_t

    def check_prediction(self, prediction_type: str) -> None:
        """Raises ArgumentError where the table ends at abar = 0, at which epsilon says nothing about x0."""
        if prediction_name(prediction_type) == "epsilon" and self.sigma_range[1] == 1:
            wanted = "v_prediction where alphas_cumprod reaches 0"
            raise ArgumentError("prediction_to_flow", "prediction_type", wanted, repr(prediction_type))

    def _table(self, device: torch.device) -> torch.Tensor:
        if device not in self._sigmas:
            self._sigmas[device] = self._sigmas[torch.device("cpu")].to(widest(device)).to(device)
        return self._sigmas[device]


def _require_within(function: str, argument: str, values: torch.Tensor, low: float, high: float) -> None:
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not bool(((values >= low) & (values <= high)).all()):  # False for NaN
        raise ArgumentError(function, argument, f"in [{low}, {high}]", values.flatten().tolist())
