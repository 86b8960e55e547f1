"""The benchmark's networks: diffusers' own transformers as students, in the configurations of known models.

Weights are random: speed and memory do not depend on their values. Latents are those of 1024x1024 images; the tiny
configurations, for machines without a GPU, have larger patches or smaller latents so that a step takes a fraction of a
second.
"""

from typing import Any

import diffusers
import torch

from twinflow.conditioning import LORA_MODE
from twinflow.lora import add_lora
from twinflow.memory.planner.architectures import Architecture, architectures
from twinflow.memory.planner.workload import Workload
from twinflow.models import FlowModel, load

_TINY = (
    Architecture(
        "tiny-sd3", "SD3Transformer2DModel",
        dict(sample_size=128, patch_size=16, num_layers=2, attention_head_dim=32, num_attention_heads=4,
             joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64, pos_embed_max_size=8,
             qk_norm="rms_norm"),
        latent_channels=16, latent_factor=8, text_tokens=16,
    ),
    Architecture(
        "tiny-qwen-image", "QwenImageTransformer2DModel",
        dict(num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64,
             axes_dims_rope=(8, 12, 12)),
        latent_channels=16, latent_factor=64, text_tokens=16, lora_rank=8,
    ),
    Architecture(
        "tiny-sana", "SanaTransformer2DModel",
        dict(num_layers=2, num_attention_heads=4, attention_head_dim=16, num_cross_attention_heads=4,
             cross_attention_head_dim=16, cross_attention_dim=64, caption_channels=64, sample_size=32),
        latent_channels=32, latent_factor=128, text_tokens=16,
    ),
)  # fmt: skip
NETWORKS = architectures() | {network.name: network for network in _TINY}
# Whose graph of a whole batch fits no card without.
CHECKPOINTED = ("qwen-image", "sd3.5-large", "flux.1", "z-image")


def shortened(name: str, depth: int | None) -> Architecture:
    """A named model with some of its blocks, evenly over its depth, so that every kind keeps its share; None: whole."""
    whole = NETWORKS[name]
    if depth is None:
        return whole
    blocks = whole.blocks()
    if not 1 <= depth <= len(blocks):
        raise ValueError(f"networks: depth must be 1 to {len(blocks)} for {name}, got {depth}")
    return whole.with_blocks([blocks[i * len(blocks) // depth] for i in range(depth)])


def workload(name: str, depth: int | None = None, **settings: Any) -> Workload:
    """What training a named model at 1024x1024 takes, as it is usually trained; full training is in float32."""
    network = shortened(name, depth)
    base = "float32" if network.lora_rank is None else "bfloat16"
    return Workload(architecture=network, lora_rank=network.lora_rank, base=base, **settings)


def build(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    depth: int | None = None,
    checkpointing: bool | None = None,
) -> FlowModel:
    """A named model with seeded random weights, made on the device, conditioned and ready to train.

    Args:
        name: one of `NETWORKS`.
        device, dtype: of its weights.
        depth: number of blocks; None: all.
        checkpointing: gradient checkpointing of every block; None: where a whole batch fits no card without.
    """
    network = shortened(name, depth)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = getattr(diffusers, network.transformer)(**network.config)
    finally:
        torch.set_default_dtype(before)
    if name in CHECKPOINTED if checkpointing is None else checkpointing:
        transformer.enable_gradient_checkpointing()
    student = load(transformer)
    if network.lora_rank is not None:
        return add_lora(student, network.lora_rank)
    student.condition(LORA_MODE)
    return student


def random_batch(
    name: str, student: FlowModel, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Latents (B, C, H, W), a condition of B rows and an unconditional one of one row."""
    asked = workload(name)
    latents = torch.randn(batch, *asked.latent, device=device, dtype=dtype)

    def condition(rows: int) -> dict[str, torch.Tensor]:
        return {
            key: torch.randn(rows, *[asked.tokens] * (key == "prompt_embeds"), width, device=device, dtype=dtype)
            for key, width in student.condition_widths().items()
        }

    return latents, condition(batch), condition(1)
