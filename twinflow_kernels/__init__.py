"""Fused kernels for few-step flow matching, as torch operations with one reference each."""

from twinflow_kernels.rollout_step import rollout_step_

__all__ = ["rollout_step_"]
