"""Fused kernels for few-step flow matching, as torch operations with one reference each."""

from twinflow_kernels.dual_time_embedding import dual_time_embedding
from twinflow_kernels.ema_update import ema_update_
from twinflow_kernels.rollout_start import rollout_start
from twinflow_kernels.rollout_step import rollout_step_
from twinflow_kernels.velocity_loss import velocity_loss

__all__ = ["dual_time_embedding", "ema_update_", "rollout_start", "rollout_step_", "velocity_loss"]
