"""Diffusers models as students: `load()` and one file per family.

Adding a family is one file and one line. The file: a subclass of `FlowModel` (base.py documents every attribute and
method) with (1) `family`, `transformer_class` and `pipeline_class`, diffusers' names; (2) `time_embedder()`, where its
time goes in, and `second_embedder`; (3) `condition_settings`; (4) `velocity()`, one call of the transformer, its time
scale, direction and sign; (5) `encode_prompt()`; (6) `latent_channels()`, `latent_multiple()` and `autoencoder` where
they are not the usual ones; (7) `lora_targets`; (8) how its pipeline guides and where its noise comes from; (9)
`block_lists` and `published`, for memory and the planner; (10) `modulation`, where its blocks have such layers. The
line: an entry of `REGISTRATIONS` in registry.py. tests/models/test_toy_family.py does all of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinflow.models.base import FlowModel
    from twinflow.models.loading import load
    from twinflow.models.registry import FAMILIES, register

__all__ = ["FAMILIES", "FlowModel", "load", "register"]

_HOMES = {"FAMILIES": "registry", "FlowModel": "base", "load": "loading", "register": "registry"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
