"""Tiny configurations of real diffusers pipelines, random weights from a fixed seed, saved the way checkpoints are.

The latent channels and the config values a pipeline reads (scaling factors, shifts, schedulers) are those of the
published checkpoints; widths, depths and the autoencoders' compression are small.
"""

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PNDMScheduler,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    ZImagePipeline,
)
from helpers import tiny_text
from helpers.tiny_text import (
    clip_text_encoder,
    clip_tokenizer,
    gemma_text_encoder,
    gemma_tokenizer,
    qwen_text_encoder,
    qwen_tokenizer,
    qwen_vision_text_encoder,
    spread_weights,
    t5_text_encoder,
    t5_tokenizer,
)
from torch import nn

from twinflow import models
from twinflow.models import FlowModel

# Latents are not square, so that a swapped height and width shows.
_LATENT_HEIGHT, _LATENT_WIDTH = 8, 12
_VARIANTS: dict[str, tuple[str, dict]] = {"flux_guidance": ("flux", dict(guidance_embeds=True)), "sd15": ("unet", {})}
FAMILIES = ("qwen_image", "sd3", "sana", "flux", "flux_guidance", "z_image", "sd15")
# Pixels per latent: each autoencoder halves once, SANA's three times because its pipeline wants sides divisible by 32.
_COMPRESSION = dict.fromkeys(FAMILIES, 2) | {"sana": 8}
_SCHEDULERS = {
    "qwen_image": (FlowMatchEulerDiscreteScheduler, dict(
        base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, use_dynamic_shifting=True
    )),
    "sd3": (FlowMatchEulerDiscreteScheduler, dict(shift=3.0)),
    "sana": (DPMSolverMultistepScheduler, dict(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )),
    "flux": (FlowMatchEulerDiscreteScheduler, dict(shift=1.0)),
    "flux_guidance": (FlowMatchEulerDiscreteScheduler, dict(shift=3.0, use_dynamic_shifting=True)),
    "z_image": (FlowMatchEulerDiscreteScheduler, dict(shift=3.0)),
    "sd15": (PNDMScheduler, dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        prediction_type="epsilon",
    )),
}  # fmt: skip


def tiny_transformer(family: str, **changes: object) -> nn.Module:
    """The family's transformer (UNet for `sd15`), the same weights in every call; `changes` override its config."""
    model, config = _settings(family)
    with _seeded(f"{family} transformer"):
        return spread_weights(getattr(diffusers, model.transformer_class)(**(config | changes)))


def _settings(family: str) -> tuple[type[FlowModel], dict]:
    name, changes = _VARIANTS.get(family, (family, {}))
    return models.FAMILIES[name], models.FAMILIES[name].tiny | changes


def tiny_pipeline(family: str, folder: Path, **transformer_changes: object) -> Path:
    """Saves the family's pipeline to `folder`, which `DiffusionPipeline.from_pretrained` then loads."""
    transformer = tiny_transformer(family, **transformer_changes)
    with _seeded(f"{family} pipeline"):
        _PIPELINES[family](transformer, _scheduler(family)).save_pretrained(folder)
    return folder


@functools.cache
def saved_pipeline(family: str) -> Path:
    """A folder with the family's pipeline, built once a run by the first process that asks; only for reading."""
    sources = [module.read_bytes() for module in (Path(__file__), Path(tiny_text.__file__))]
    built_by = zlib.crc32(repr((_settings(family), diffusers.__version__, transformers.__version__, sources)).encode())
    folder = _folder() / f"{family}-{built_by:08x}"
    if not folder.exists():
        partial = tiny_pipeline(family, Path(tempfile.mkdtemp(dir=_folder())))
        with contextlib.suppress(OSError):  # another process was quicker
            partial.rename(folder)
    return folder


def latent_shape(family: str, batch: int) -> tuple[int, int, int, int]:
    """(B, C, H, W) of the unpacked latents of an image of `image_size(family)`."""
    model, config = _settings(family)
    channels = config.get("in_channels", 4) // (4 if model.packs_latents else 1)
    return batch, channels, _LATENT_HEIGHT, _LATENT_WIDTH


def image_size(family: str) -> tuple[int, int]:
    """(height, width) in pixels of the smallest image worth a test."""
    return _LATENT_HEIGHT * _COMPRESSION[family], _LATENT_WIDTH * _COMPRESSION[family]


def call_arguments(family: str) -> dict:
    """What a quick call of the family's pipeline needs beside prompt and steps: a small image, guidance off."""
    height, width = image_size(family)
    # SANA would draw at the nearest of its 512-pixel shapes, behind a prompt with an instruction of 1500 letters.
    small = dict(use_resolution_binning=False, complex_human_instruction=None) if family == "sana" else {}
    return dict(height=height, width=width, guidance_scale=0.0) | small


@contextlib.contextmanager
def _seeded(name: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        yield


@functools.cache
def _folder() -> Path:
    """`TWINFLOW_TINY_PIPELINES`, which processes share, or a folder of this process that goes at its exit."""
    if shared := os.environ.get("TWINFLOW_TINY_PIPELINES"):
        return Path(shared)
    folder = Path(tempfile.mkdtemp(prefix="twinflow-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _scheduler(family: str) -> object:
    cls, config = _SCHEDULERS[family]
    return cls(**config)


def _kl_vae(channels: int, scaling: float, shift: float | None) -> nn.Module:
    return spread_weights(AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=scaling, shift_factor=shift, use_quant_conv=shift is None, use_post_quant_conv=shift is None,
    ))  # fmt: skip


def _qwen_image(transformer: nn.Module, scheduler: object) -> DiffusionPipeline:
    template = QwenImagePipeline(*[None] * 5).prompt_template_encode
    tokenizer = qwen_tokenizer(template)
    vae = AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False])
    text_encoder = qwen_vision_text_encoder(tokenizer, 16)
    return QwenImagePipeline(scheduler, spread_weights(vae), text_encoder, tokenizer, transformer)


def _sd3(transformer: nn.Module, scheduler: object) -> DiffusionPipeline:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer, scheduler, _kl_vae(16, 1.5305, 0.0609),
        text_encoder=clip_text_encoder(clip, 16, projected=True), tokenizer=clip,
        text_encoder_2=clip_text_encoder(clip, 24, projected=True), tokenizer_2=clip,
        text_encoder_3=t5_text_encoder(t5, 48), tokenizer_3=t5,
    )  # fmt: skip


def _sana(transformer: nn.Module, scheduler: object) -> DiffusionPipeline:
    channels, layers, scales = (8, 16, 32, 32), (1, 1, 1, 1), ((), (), (), (5,))
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        latent_channels=32, attention_head_dim=8, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, encoder_layers_per_block=layers,
        decoder_layers_per_block=layers, encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        scaling_factor=0.41407,
    )  # fmt: skip
    tokenizer = gemma_tokenizer()
    return SanaPipeline(tokenizer, gemma_text_encoder(tokenizer, 24), spread_weights(vae), transformer, scheduler)


def _flux(transformer: nn.Module, scheduler: object) -> DiffusionPipeline:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    encoders = clip_text_encoder(clip, 16), clip, t5_text_encoder(t5, 48), t5
    return FluxPipeline(scheduler, _kl_vae(16, 0.3611, 0.1159), *encoders, transformer)


def _z_image(transformer: nn.Module, scheduler: object) -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    vae, text_encoder = _kl_vae(16, 0.3611, 0.1159), qwen_text_encoder(tokenizer, 16)
    return ZImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer)


def _sd15(transformer: nn.Module, scheduler: object) -> DiffusionPipeline:
    tokenizer = clip_tokenizer()
    vae, text_encoder = _kl_vae(4, 0.18215, None), clip_text_encoder(tokenizer, 32)
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, transformer, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


_PIPELINES = {
    "qwen_image": _qwen_image, "sd3": _sd3, "sana": _sana, "flux": _flux, "flux_guidance": _flux,
    "z_image": _z_image, "sd15": _sd15,
}  # fmt: skip
