"""`Autoencoder`: how the autoencoder of a pipeline makes the latents that its transformer is trained on."""

from typing import Any, ClassVar

import torch

from twinflow.errors import ArgumentError


class Autoencoder:
    """An AutoencoderKL: the mode of the distribution, shifted and scaled. Subclasses are other kinds.

    Methods take and give tensors in float32 or wider around the autoencoder, which runs in its own dtype.
    """

    class_name: ClassVar[str] = "AutoencoderKL"  # diffusers' class
    channels_setting: ClassVar[str] = "latent_channels"  # setting that is C of its latents
    levels: ClassVar[tuple[str, int]] = (
        "block_out_channels",
        1,
    )  # setting that lists its levels, and how many are flat

    @classmethod
    def factor(cls, config: dict[str, Any]) -> int:
        """Pixels per latent along an edge, by the autoencoder's config.json.

        Raises:
            ValueError: an autoencoder of another kind.
        """
        name, flat = cls.levels
        if config.get("_class_name") != cls.class_name:
            raise ArgumentError(
                "Encoders", "folder", f"a pipeline with {cls.class_name} as vae", config.get("_class_name")
            )
        if not isinstance(config.get(name), list):
            raise ArgumentError("Encoders", "vae/config.json", name, repr(config.get(name)), verb="list")
        return 2 ** (len(config[name]) - flat)

    @classmethod
    def check(cls, vae: Any, function: str) -> None:
        """Raises ValueError unless a loaded autoencoder is of this kind."""
        if type(vae).__name__ != cls.class_name:
            raise ArgumentError(function, "vae", cls.class_name, type(vae).__name__)

    @classmethod
    def encode(cls, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, height, width) in -1 .. 1, in the autoencoder's dtype -> latents (B, C, H, W)."""
        raw = vae.encode(pixels).latent_dist.mode().to(_wide(vae))
        return (raw - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    @classmethod
    def decode(cls, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, H, W), float32 or wider -> pixels (B, 3, height, width), about -1 .. 1."""
        raw = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        return vae.decode(raw.to(vae.dtype), return_dict=False)[0]


class DeepCompressionAutoencoder(Autoencoder):
    """An AutoencoderDC: no distribution, no shift."""

    class_name = "AutoencoderDC"
    levels = ("encoder_block_out_channels", 1)

    @classmethod
    def encode(cls, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        return vae.encode(pixels).latent.to(_wide(vae)) * vae.config.scaling_factor


class FrameAutoencoder(Autoencoder):
    """An AutoencoderKLQwenImage: images are films of one frame; latents are normalised channel by channel."""

    class_name = "AutoencoderKLQwenImage"
    channels_setting = "z_dim"
    levels = ("temperal_downsample", 0)

    @classmethod
    def encode(cls, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        raw = vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2).to(_wide(vae))
        mean, std = cls._statistics(vae, raw.device)
        return (raw - mean) / std

    @classmethod
    def decode(cls, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        mean, std = cls._statistics(vae, latents.device)
        return vae.decode((latents * std + mean).unsqueeze(2).to(vae.dtype), return_dict=False)[0][:, :, 0]

    @staticmethod
    def _statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor, ...]:
        config = vae.config
        return tuple(torch.tensor(v, device=device).view(-1, 1, 1) for v in (config.latents_mean, config.latents_std))


def _wide(vae: Any) -> torch.dtype:
    return torch.promote_types(vae.dtype, torch.float32)
