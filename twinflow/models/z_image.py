"""Z-Image as a student: its time runs from noise to data, and it predicts the velocity towards the data."""

from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from twinflow.conditioning import TimeEmbedder
from twinflow.errors import ArgumentError
from twinflow.models.base import FlowModel, Published
from twinflow.models.modulation import Modulation

_COMFYUI = {
    "all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer.",
    ".attention.to_out.0.": ".attention.out.", ".attention.norm_q.": ".attention.q_norm.",
    ".attention.norm_k.": ".attention.k_norm.",
}  # fmt: skip
_QKV = ("to_q", "to_k", "to_v")


class ZImageModel(FlowModel):
    """F(x_t, t, r, cond) of a ZImageTransformer2DModel; cond: `prompt_embeds`, and `prompt_lengths` or `prompt_mask`.

    The second embedder is asked for t - r, as in the published Z-Image checkpoints. Negative times go on past the data
    end, to 1 + |t|, so that they never coincide with positive ones.
    """

    family = "z_image"
    transformer_class = "ZImageTransformer2DModel"
    pipeline_class = "ZImagePipeline"
    stock_sigmas = "list"
    second_embedder = "t_embedder_2.mlp"
    condition_settings: ClassVar = {"prompt_embeds": "cap_feat_dim"}
    comfyui = True
    block_lists = (("n_layers", "layers"),)
    published = (
        Published(
            "z-image", dict(),
            latent_channels=16, text_tokens=256, lora_rank=64, text_encoder_gb=8.0,
            repositories=("Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image"),
        ),
    )  # fmt: skip
    tiny: ClassVar = dict(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    prompt_multiple = 32  # the transformer pads captions to it, with a token of its own
    lora_targets = (
        "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1",
        "feed_forward.w2", "feed_forward.w3", "t_embedder.mlp.0", "t_embedder.mlp.2",
    )  # fmt: skip
    modulation = Modulation(
        "t_embedder", ("noise_refiner", "layers", "all_final_layer"), ("adaLN_modulation.0", "adaLN_modulation.1")
    )

    def time_embedder(self) -> TimeEmbedder:
        return TimeEmbedder(
            "t_embedder.mlp", self.second_embedder, float(self.config.t_scale), reversed=True, difference=True
        )

    def latent_multiple(self) -> int:
        return self.config.all_patch_size[0]

    def longest_edge(self) -> int:
        return min(self.config.axes_lens[1:]) * self.config.all_patch_size[0]

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], lengths: list[int]) -> torch.Tensor:
        prompt = cond["prompt_embeds"].to(x_t.dtype)
        patch = self.config.all_patch_size[0]
        outputs = self.transformer(
            list(x_t.unsqueeze(2).unbind(0)),
            1 - t,
            [row[:length] for row, length in zip(prompt, lengths, strict=True)],
            patch_size=patch,
            return_dict=False,
        )[0]
        return -torch.stack(outputs).squeeze(2)

    @staticmethod
    def comfyui_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Its layers have names of their own there, with the three projections of an attention in one."""
        renamed = {}
        for name, value in tensors.items():
            for diffusers_part, comfyui_part in _COMFYUI.items():
                name = name.replace(diffusers_part, comfyui_part)
            if name.startswith("all_"):
                raise ArgumentError("export", "format", "'diffusers' for a Z-Image with " + name, "'comfyui'")
            if ".attention.to_q." in name:
                parts = [tensors[name.replace("to_q", projection)] for projection in _QKV]
                renamed[name.replace("to_q", "qkv")] = torch.cat(parts)
            elif not any(f".attention.{projection}." in name for projection in _QKV):
                renamed[name] = value
        return renamed

    def encode_prompt(self, pipe: Any, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        # A copy: the pipeline writes its chat template into the list.
        embeds, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, **options)
        lengths = torch.tensor([len(row) for row in embeds])
        return {"prompt_embeds": pad_sequence(embeds, batch_first=True), "prompt_lengths": lengths}
