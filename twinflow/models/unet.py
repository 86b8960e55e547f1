"""Stable Diffusion 1.5, 2 and XL as students: epsilon- and v-prediction UNets through the diff2flow bridge."""

from typing import Any, ClassVar

import torch
from torch import nn

from twinflow.bridge import DiffusionToFlowBridge, prediction_name
from twinflow.conditioning import TimeEmbedder
from twinflow.errors import require
from twinflow.models.base import FlowModel, without_peft

_TIMESTEPS = ("fractional", "nearest")
_TIME_IDS = 6  # original height and width, crop top and left, target height and width


class UNetModel(FlowModel):
    """F(x_t, t, r, cond) of a UNet2DConditionModel; cond: `prompt_embeds`, and for SDXL `pooled_prompt_embeds` and
    `time_ids` (B, 6).

    The UNet is given the diffusion point x_t / sqrt((1 - |t|)^2 + t^2) and the timestep of sigma = |t|, and its
    prediction is read as a velocity, in every call. Fractional timesteps are the default: with the optimal denoiser of
    Gaussian data and the betas of Stable Diffusion 1.5 the velocity's error is 1.1e-4, with the nearest ones 1.9e-3.

    The table of timesteps ends at sigma = 0.936. Later times are asked at its last timestep; there F = (x_t - x0) / |t|
    with the x0 of the prediction, so that the one-step sample from pure noise is the `pred_original_sample` of stock
    samplers. Times before its first sigma, 0.028, are asked at its first timestep.

    Args:
        transformer: the UNet, perhaps inside peft's wrapper; used as it is.
        scheduler: the diffusers scheduler it was trained with, for `alphas_cumprod` and the prediction type.
        alphas_cumprod, prediction_type: these two, instead of a scheduler.
        diff2flow_enabled, twinflow_allow_diff2flow: the two opt-ins; both must be True.
        timesteps: `fractional` or `nearest`.
        options: `conditioning` and `cfg_time`, as for `FlowModel`. The conditioning is told timesteps, not sigma.

    Raises:
        ValueError: no opt-in, no table, an unsupported prediction type, or another kind of UNet.
    """

    family = "unet"
    transformer_class = "UNet2DConditionModel"
    pipeline_class = "StableDiffusionPipeline"
    second_embedder = "time_embedding_2"
    samples_in_pipelines = False
    component = "unet"
    negative_prompts_differ = True  # SDXL has zeros for the empty one
    tiny: ClassVar = dict(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=2, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    # The choice of diffusers' consistency distillation of Stable Diffusion.
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
        "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    )  # fmt: skip

    def __init__(
        self,
        transformer: nn.Module,
        *,
        scheduler: Any = None,
        alphas_cumprod: torch.Tensor | None = None,
        prediction_type: str | None = None,
        diff2flow_enabled: bool = False,
        twinflow_allow_diff2flow: bool = False,
        timesteps: str = "fractional",
        **options: Any,
    ) -> None:
        if not (diff2flow_enabled is True and twinflow_allow_diff2flow is True):
            raise ValueError(
                "TwinFlow is only supported for flow-matching models. Enable diff2flow bridging explicitly to run with "
                "epsilon/v_prediction targets."
            )
        require(timesteps in _TIMESTEPS, "load", "timesteps", f"one of {', '.join(_TIMESTEPS)}", repr(timesteps))
        if scheduler is not None:
            alone = alphas_cumprod is None and prediction_type is None
            require(alone, "load", "alphas_cumprod and prediction_type", "None beside a scheduler", "both")
            alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
            prediction_type = scheduler.config.get("prediction_type")
            if alphas_cumprod is None:
                raise ValueError("TwinFlow diff2flow bridge requested but unavailable.")
        self.bridge = DiffusionToFlowBridge(alphas_cumprod)  # type: ignore[arg-type]  # None is its error
        self.prediction_type = prediction_name(prediction_type)
        self.bridge.check_prediction(self.prediction_type)
        self._interpolate = timesteps == "fractional"
        _require_text_to_image(transformer)
        super().__init__(transformer, **options)

    def time_embedder(self) -> TimeEmbedder:
        config = self.config
        features = config.time_embedding_type
        wanted = f"None for a UNet with {features} time features"
        require(features == "positional", "load", "conditioning", wanted, "a mode")
        return TimeEmbedder(
            "time_embedding", self.second_embedder, float(self.bridge.num_timesteps),
            num_channels=config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos,
            downscale_freq_shift=float(config.freq_shift),
        )  # fmt: skip

    def condition_widths(self) -> dict[str, int]:
        config = self.config
        widths = {"prompt_embeds": config.encoder_hid_dim or config.cross_attention_dim}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
            widths |= {"pooled_prompt_embeds": pooled, "time_ids": _TIME_IDS}
        return widths

    def latent_multiple(self) -> int:
        return 1  # UNet2DConditionModel fits odd sizes itself

    def embedded_times(self, t: torch.Tensor) -> torch.Tensor:
        timesteps = self.bridge.sigma_to_timesteps(t, interpolate=self._interpolate)
        return torch.copysign(timesteps.to(t.dtype) / self.bridge.num_timesteps, t)

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], lengths: list[int]) -> torch.Tensor:
        timesteps = self.bridge.sigma_to_timesteps(t, interpolate=self._interpolate)
        at = self.bridge.timesteps_to_sigma(timesteps, x_t.shape)  # sigma of the timestep asked
        asked = t.abs().to(at.dtype).view(at.shape)
        level = torch.where(asked > self.bridge.sigma_range[1], asked, at)
        norm = torch.hypot(1 - level, level)
        wide = torch.promote_types(x_t.dtype, torch.float32)
        x_d = (x_t / norm.to(wide)).to(x_t.dtype)
        added = None
        if "time_ids" in self.condition_widths():
            added = {"text_embeds": cond["pooled_prompt_embeds"].to(x_t.dtype), "time_ids": cond["time_ids"]}
        prediction = self.transformer(
            x_d,
            timesteps.to(torch.promote_types(t.dtype, torch.float32)),
            encoder_hidden_states=cond["prompt_embeds"].to(x_t.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        flow = self.bridge.prediction_to_flow(prediction, x_d, timesteps, prediction_type=self.prediction_type)
        # x0 = x_d norm(at) - at flow, and F = (x_t - x0) / level; up to the last sigma the two factors are 1 and 0
        of_x_t = (1 - torch.hypot(1 - at, at) / norm) / level
        return (at / level).to(wide) * flow + of_x_t.to(wide) * x_t

    def encode_prompt(
        self, pipe: Any, prompts: list[str], *, size: tuple[int, int] | None = None, **options: Any
    ) -> dict[str, torch.Tensor]:
        """The condition of some prompts by a stock pipeline's encoders.

        Args:
            pipe: the diffusers pipeline.
            prompts: B texts; SDXL has zeros for empty ones unless `force_zeros_for_empty_prompt` is off.
            size: height and width of the image, px, which SDXL is told; None: the pipeline's default.
            options: passed on to its `encode_prompt`.
        """
        asked = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, **options}
        if "time_ids" not in self.condition_widths():
            embeds = pipe.encode_prompt(prompts, **{"device": pipe._execution_device, **asked})[0]
            return {"prompt_embeds": embeds}
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, **asked)
        if pipe.config.get("force_zeros_for_empty_prompt"):
            empty = torch.tensor([not prompt for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        ids = torch.zeros(len(prompts), _TIME_IDS, dtype=torch.float32, device=embeds.device)
        cond = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": ids}
        return self.at_size(cond, size or (pipe.default_sample_size * pipe.vae_scale_factor,) * 2)

    @staticmethod
    def at_size(cond: dict[str, torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
        if "time_ids" not in cond:
            return cond
        ids = torch.tensor([*size, 0, 0, *size]).to(cond["time_ids"])
        return cond | {"time_ids": ids.expand_as(cond["time_ids"]).contiguous()}


def _require_text_to_image(transformer: nn.Module) -> None:
    """Raises ValueError unless a UNet takes latents, a time and what SD or SDXL condition on, and nothing else."""
    config = without_peft(transformer).config
    found = {
        "in_channels": (config.in_channels, (config.out_channels,)),
        "addition_embed_type": (config.addition_embed_type, (None, "text_time")),
        "class_embed_type": (config.class_embed_type, (None,)),
        "num_class_embeds": (config.num_class_embeds, (None,)),
        "encoder_hid_dim_type": (config.encoder_hid_dim_type, (None, "text_proj")),
    }
    for name, (value, allowed) in found.items():
        wanted = f"a text-to-image UNet with {name} {' or '.join(map(repr, allowed))}"
        require(value in allowed, "load", "transformer", wanted, repr(value))
