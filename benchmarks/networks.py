"""The benchmark's networks: diffusers' own transformers as students, in the configurations of known models.

Weights are random: speed and memory do not depend on their values. Latents are those of 1024x1024 images; the tiny
configurations, for machines without a GPU, have larger patches or smaller latents so that a step takes a fraction of a
second.
"""

from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from twinflow.lora import add_lora
from twinflow.models import FlowModel, load


@dataclass(frozen=True)
class Network:
    """A model's transformer and how it is trained.

    Args:
        transformer: diffusers' class.
        config: what differs from the class's defaults.
        latent: (C, H, W).
        text_tokens: length of the prompts.
        lora_rank: LoRA on a frozen base; None: all weights are trained.
        checkpointing: gradient checkpointing of every block.
    """

    transformer: str
    config: dict[str, Any]
    latent: tuple[int, int, int]
    text_tokens: int
    lora_rank: int | None = None
    checkpointing: bool = False


_SD3 = dict(joint_attention_dim=4096, pooled_projection_dim=2048, qk_norm="rms_norm", sample_size=128)
_SANA = dict(caption_channels=2304, sample_size=32)
NETWORKS = {
    "qwen-image": Network(
        "QwenImageTransformer2DModel", {}, (16, 128, 128), 256, lora_rank=64, checkpointing=True
    ),
    "sd3.5-medium": Network(
        "SD3Transformer2DModel",
        _SD3 | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
                    dual_attention_layers=tuple(range(13))),
        (16, 128, 128), 333,
    ),
    "sd3.5-large": Network(
        "SD3Transformer2DModel",
        _SD3 | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192),
        (16, 128, 128), 333, lora_rank=64, checkpointing=True,
    ),
    "sana-1.6b": Network("SanaTransformer2DModel", _SANA, (32, 32, 32), 300),
    "sana-0.6b": Network(
        "SanaTransformer2DModel",
        _SANA | dict(num_layers=28, num_attention_heads=36, num_cross_attention_heads=16, cross_attention_head_dim=72,
                     cross_attention_dim=1152),
        (32, 32, 32), 300,
    ),
    "flux.1-dev": Network(
        "FluxTransformer2DModel", dict(guidance_embeds=True), (16, 128, 128), 512, lora_rank=64, checkpointing=True
    ),
    "z-image": Network("ZImageTransformer2DModel", {}, (16, 128, 128), 256, lora_rank=64, checkpointing=True),
    "tiny-sd3": Network(
        "SD3Transformer2DModel",
        dict(sample_size=128, patch_size=16, num_layers=2, attention_head_dim=32, num_attention_heads=4,
             joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=8,
             qk_norm="rms_norm"),
        (16, 128, 128), 16,
    ),
    "tiny-qwen-image": Network(
        "QwenImageTransformer2DModel",
        dict(num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64,
             axes_dims_rope=(8, 12, 12)),
        (16, 16, 16), 16, lora_rank=8,
    ),
    "tiny-sana": Network(
        "SanaTransformer2DModel",
        dict(num_layers=2, num_attention_heads=4, attention_head_dim=16, num_cross_attention_heads=4,
             cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=64, sample_size=32),
        (32, 8, 8), 16,
    ),
}  # fmt: skip


def build(name: str, device: torch.device, dtype: torch.dtype) -> FlowModel:
    """A named model with seeded random weights, made on the device in its dtype, conditioned and ready to train."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = getattr(diffusers, network.transformer)(**network.config)
    finally:
        torch.set_default_dtype(before)
    if network.checkpointing:
        transformer.enable_gradient_checkpointing()
    student = load(transformer)
    if network.lora_rank is not None:
        return add_lora(student, network.lora_rank)
    student.condition("dual")
    return student


def random_batch(
    name: str, student: FlowModel, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Latents (B, C, H, W), a condition of B rows and an unconditional one of one row."""
    network = NETWORKS[name]
    latents = torch.randn(batch, *network.latent, device=device, dtype=dtype)

    def condition(rows: int) -> dict[str, torch.Tensor]:
        return {
            key: torch.randn(rows, *[network.text_tokens] * (key == "prompt_embeds"), width, device=device, dtype=dtype)
            for key, width in student.condition_widths().items()
        }

    return latents, condition(batch), condition(1)
