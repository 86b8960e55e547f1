"""FLUX.1 as a student."""

from typing import Any, ClassVar

import torch

from twinflow.conditioning import TimeEmbedder
from twinflow.models.base import FlowModel, Published, rows_of
from twinflow.models.modulation import Modulation
from twinflow.models.packing import pack, unpack


class FluxModel(FlowModel):
    """F(x_t, t, r, cond) of a FluxTransformer2DModel; cond: `prompt_embeds`, `pooled_prompt_embeds`.

    Where the transformer embeds a guidance scale, `cond["guidance"]` (B,) is used, or else `guidance`, as pipelines do.
    """

    family = "flux"
    transformer_class = "FluxTransformer2DModel"
    pipeline_class = "FluxPipeline"
    second_embedder = "time_text_embed_2.timestep_embedder"
    condition_settings: ClassVar = {
        "prompt_embeds": "joint_attention_dim",
        "pooled_prompt_embeds": "pooled_projection_dim",
    }
    guidance_argument = "true_cfg_scale"
    guidance_off = 1.0
    packs_latents = True
    block_lists = (("num_layers", "transformer_blocks"), ("num_single_layers", "single_transformer_blocks"))
    published = (
        Published(
            "flux.1", dict(guidance_embeds=True),
            latent_channels=16, text_tokens=512, lora_rank=64, text_encoder_gb=9.8,
            repositories=("black-forest-labs/FLUX.1-dev",),
        ),
    )  # fmt: skip
    tiny: ClassVar = dict(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    guidance = 3.5  # an input, the stock pipeline's default
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
        "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
        "ff_context.net.2", "proj_mlp", "timestep_embedder.linear_1", "timestep_embedder.linear_2",
    )  # fmt: skip
    modulation = Modulation(
        "time_text_embed", ("transformer_blocks", "single_transformer_blocks", "norm_out"),
        ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"),
    )  # fmt: skip

    def time_embedder(self) -> TimeEmbedder:
        return TimeEmbedder("time_text_embed.timestep_embedder", self.second_embedder)

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], lengths: list[int]) -> torch.Tensor:
        batch, _, height, width = x_t.shape
        prompt = cond["prompt_embeds"].to(x_t.dtype)
        guidance = None
        if self.config.guidance_embeds:
            guidance = cond["guidance"] if "guidance" in cond else rows_of(self.guidance, batch, x_t)
        tokens = self.transformer(
            hidden_states=pack(x_t),
            timestep=t,
            guidance=guidance,
            pooled_projections=cond["pooled_prompt_embeds"].to(x_t.dtype),
            encoder_hidden_states=prompt,
            txt_ids=torch.zeros(prompt.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=_positions(height // 2, width // 2, x_t),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def encode_prompt(self, pipe: Any, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        embeds, pooled, _ = pipe.encode_prompt(prompts, None, **options)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _positions(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """(rows columns, 3): zero, row and column of each token."""
    grid = torch.zeros(rows, columns, 3, device=like.device, dtype=like.dtype)
    grid[..., 1] = torch.arange(rows, device=like.device)[:, None]
    grid[..., 2] = torch.arange(columns, device=like.device)[None]
    return grid.reshape(rows * columns, 3)
