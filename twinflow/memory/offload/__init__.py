"""Activation offload: saved tensors wait in pinned host memory."""
