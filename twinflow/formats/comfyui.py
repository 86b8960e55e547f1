"""Key names under which ComfyUI reads a LoRA: diffusers' names of the layers under a prefix of its own.

It never asks for a negative time, so that sign tables stay out; second time embedders have the names that nodes for
two-time models look for. Names of whole models are the families' (`FlowModel.comfyui_tensors`).
"""

import torch

from twinflow.errors import ArgumentError

_PREFIX = "diffusion_model."
_PLACES = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}


def lora_tensors(tensors: dict[str, torch.Tensor], scalings: dict[str, float]) -> dict[str, torch.Tensor]:
    """A LoRA under ComfyUI's names.

    Args:
        tensors: `<layer>.lora_A.weight` and `<layer>.lora_B.weight`.
        scalings: layer -> factor of its product B A.

    Returns:
        For each layer the two weights and `alpha`, the factor times the rank.

    Raises:
        ValueError: a tensor has no place there.
    """
    found = {}
    for name, value in tensors.items():
        place = next((place for place in _PLACES if name.endswith(place)), None)
        if place is None:
            raise ArgumentError("export", "format", f"'diffusers' for an adapter with {name}", "'comfyui'")
        layer = name.removesuffix(place)
        found[f"{_PREFIX}{layer}{_PLACES[place]}"] = value
        if place == ".lora_A.weight":
            found[f"{_PREFIX}{layer}.alpha"] = torch.tensor(scalings[layer] * value.shape[0])
    return found
