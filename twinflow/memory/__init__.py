"""Memory: mechanisms that make a training step fit, presets of them, and a planner that says what fits."""

from twinflow.memory.adamw_8bit import adamw_8bit
from twinflow.memory.apply import AppliedMemory, apply_memory
from twinflow.memory.modulation.defer import DeferredModulation, defer_modulation
from twinflow.memory.offload.activations import offload_activations
from twinflow.memory.presets import PRESETS, MemoryPreset
from twinflow.memory.quantised_base import QuantisedBase, quantise_base, quantised_form
from twinflow.memory.recompute import SAVED, selective_recompute

__all__ = [
    "PRESETS",
    "SAVED",
    "AppliedMemory",
    "DeferredModulation",
    "MemoryPreset",
    "QuantisedBase",
    "adamw_8bit",
    "apply_memory",
    "defer_modulation",
    "offload_activations",
    "quantise_base",
    "quantised_form",
    "selective_recompute",
]
