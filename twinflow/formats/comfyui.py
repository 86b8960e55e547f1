"""Key names under which ComfyUI reads Qwen-Image and Z-Image weights.

It calls the layers of a LoRA by diffusers' names under a prefix of its own, and those of a whole Z-Image model by names
of its own, with the three projections of an attention in one. It never asks for a negative time, so that sign tables
stay out; second time embedders have the names that nodes for two-time models look for.
"""

import torch

from twinflow.formats.manifest import SIGN_TABLE

FAMILIES = ("qwen_image", "z_image")
_PREFIX = "diffusion_model."
_PLACES = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
_Z_IMAGE = {
    "all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer.",
    ".attention.to_out.0.": ".attention.out.", ".attention.norm_q.": ".attention.q_norm.",
    ".attention.norm_k.": ".attention.k_norm.",
}  # fmt: skip
_QKV = ("to_q", "to_k", "to_v")


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
            raise ValueError(f"export: format must be 'diffusers' for an adapter with {name}, got 'comfyui'")
        layer = name.removesuffix(place)
        found[f"{_PREFIX}{layer}{_PLACES[place]}"] = value
        if place == ".lora_A.weight":
            found[f"{_PREFIX}{layer}.alpha"] = torch.tensor(scalings[layer] * value.shape[0])
    return found


def model_tensors(family: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A whole model under ComfyUI's names.

    Args:
        family: one of `FAMILIES`.
        tensors: name in diffusers -> weight.

    Raises:
        ValueError: a Z-Image of another patch size than 2.
    """
    kept = {name: value for name, value in tensors.items() if name.partition(".")[0] != SIGN_TABLE}
    if family != "z_image":
        return kept
    found = {}
    for name, value in kept.items():
        for theirs, comfyui in _Z_IMAGE.items():
            name = name.replace(theirs, comfyui)
        if name.startswith("all_"):
            raise ValueError(f"export: format must be 'diffusers' for a Z-Image with {name}, got 'comfyui'")
        if ".attention.to_q." in name:
            parts = [kept[name.replace("to_q", projection)] for projection in _QKV]
            found[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif not any(f".attention.{projection}." in name for projection in _QKV):
            found[name] = value
    return found
