"""Diffusers models as students: `load()` and one file per family.

Adding a family: (1) a file with a subclass of `FlowModel`; (2) `family`, and diffusers' class as `transformer_class`;
(3) `time_embedder()`: the submodule that gets the sinusoidal features; (4) `condition_widths()`: what a condition must
hold; (5) `latent_channels()` and `latent_multiple()` where they are not the config's `in_channels` and `patch_size`;
(6) `velocity()`: one call of the transformer, its time scale, direction and sign; (7) `encode_prompt()`; (8)
`lora_targets`; (9) an entry in `_ALL` of loading.py; (10) a tiny configuration in tests/helpers/tiny_pipelines.py:
every family test then runs on it.
"""

from twinflow.models.base import FlowModel
from twinflow.models.loading import FAMILIES, load

__all__ = ["FAMILIES", "FlowModel", "load"]
