"""Memory: mechanisms that make a training step fit, presets of them, and a planner that says what fits."""

from twinflow.memory.apply import AppliedMemory, apply_memory
from twinflow.memory.offload import offload_activations
from twinflow.memory.presets import PRESETS, MemoryPreset
from twinflow.memory.recompute import SAVED, selective_recompute

__all__ = [
    "PRESETS",
    "SAVED",
    "AppliedMemory",
    "MemoryPreset",
    "apply_memory",
    "offload_activations",
    "selective_recompute",
]
