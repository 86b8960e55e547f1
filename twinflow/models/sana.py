"""SANA as a student."""

import inspect
from typing import Any, ClassVar

import torch
from torch import nn

from twinflow.conditioning import TimeEmbedder
from twinflow.errors import require
from twinflow.models.autoencoders import DeepCompressionAutoencoder
from twinflow.models.base import FlowModel, Published, without_peft
from twinflow.models.prompts import host_lengths


class SanaModel(FlowModel):
    """F(x_t, t, r, cond) of a SanaTransformer2DModel; cond: `prompt_embeds`, and `prompt_lengths` or `prompt_mask`.

    Raises:
        ValueError: a SANA-Sprint transformer, which is no flow-matching model.
    """

    family = "sana"
    transformer_class = "SanaTransformer2DModel"
    pipeline_class = "SanaPipeline"
    second_embedder = "time_embed_2.emb.timestep_embedder"
    condition_settings: ClassVar = {"prompt_embeds": "caption_channels"}
    shares_generator = True
    negative_prompts_differ = True  # no instruction stands before them
    autoencoder = DeepCompressionAutoencoder
    latent_factor = 32
    block_lists = (("num_layers", "transformer_blocks"),)
    published = (
        Published(
            "sana-1.6b", dict(caption_channels=2304, sample_size=32),
            latent_channels=32, text_tokens=300, lora_rank=None, text_encoder_gb=5.2,
            repositories=("Efficient-Large-Model/Sana_1600M_1024px_diffusers",),
        ),
        Published(
            "sana-0.6b", dict(
                caption_channels=2304, sample_size=32, num_layers=28, num_attention_heads=36,
                num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152
            ),
            latent_channels=32, text_tokens=300, lora_rank=None, text_encoder_gb=5.2,
            repositories=("Efficient-Large-Model/Sana_600M_1024px_diffusers",),
        ),
    )  # fmt: skip
    tiny: ClassVar = dict(
        in_channels=32, out_channels=32, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
        sample_size=16,
    )  # fmt: skip
    lora_targets = (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
        "attn2.to_out.0", "timestep_embedder.linear_1", "timestep_embedder.linear_2",
    )  # fmt: skip

    def __init__(self, transformer: nn.Module, **options: Any) -> None:
        sprint = without_peft(transformer).config.guidance_embeds
        got = "SANA-Sprint (guidance_embeds=True), which is trained on another path"
        require(not sprint, "load", "transformer", "a flow-matching model", got, "start from SANA itself")
        super().__init__(transformer, **options)

    def time_embedder(self) -> TimeEmbedder:
        scale = 1000.0 * self.config.timestep_scale
        return TimeEmbedder("time_embed.emb.timestep_embedder", self.second_embedder, scale)

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], lengths: list[int]) -> torch.Tensor:
        return self.transformer(
            hidden_states=x_t,
            encoder_hidden_states=cond["prompt_embeds"].to(x_t.dtype),
            timestep=t * 1000 * self.config.timestep_scale,
            return_dict=False,
        )[0]

    def encode_prompt(self, pipe: Any, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        # The pipeline's own call puts an instruction before each prompt by default; its encode_prompt does not.
        default = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        options = {"complex_human_instruction": default, "do_classifier_free_guidance": False, **options}
        embeds, mask, _, _ = pipe.encode_prompt(prompts, **options)
        empty = [not prompt for prompt in prompts]
        if any(empty) and options["complex_human_instruction"]:
            bare, bare_mask, _, _ = pipe.encode_prompt(prompts, **{**options, "complex_human_instruction": None})
            rows = torch.tensor(empty, device=embeds.device)[:, None]
            embeds, mask = torch.where(rows[..., None], bare, embeds), torch.where(rows, bare_mask, mask)
        return {"prompt_embeds": embeds, "prompt_lengths": host_lengths(mask)}

    def encode_negative_prompt(self, pipe: Any, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        return self.encode_prompt(pipe, prompts, **{**options, "complex_human_instruction": None})
