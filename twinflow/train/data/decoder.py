"""`Decoder`: latents -> pixels, by the autoencoder of a pipeline's folder: the inverse of `encode_images`."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Decoder:
    """The autoencoder of a pipeline, loaded when something must be decoded.

    Args:
        folder: the pipeline on disk.
        device: where it runs.
        dtype: in which.
    """

    def __init__(
        self, folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.folder, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self._vae: Any = None

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents as `encode_images` gives them, as images; one at a time, which takes the least memory.

        Args:
            latents: (B, C, H, W), on any device.

        Returns:
            (B, height, width, 3), uint8, rounded as stock pipelines round.

        Raises:
            ValueError: an autoencoder of another kind.
            FloatingPointError: latents or images that are not finite.
        """
        vae = self._loaded()
        images = []
        for row in latents.split(1):
            pixels = _decoded(vae, row.to(self.device))
            if not (row.isfinite().all() and pixels.isfinite().all()):
                raise FloatingPointError("decode: latents and images must be finite, got others")
            levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round()  # numpy and torch round halves to even
            images.append(levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(images)

    def free(self) -> None:
        """Lets go of the autoencoder; it is loaded again where needed."""
        if self._vae is not None:
            self._vae = None
            if self.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()

    def _loaded(self) -> Any:
        if self._vae is None:
            import diffusers

            path = self.folder / "vae"
            try:
                kind = json.loads((path / "config.json").read_text(encoding="utf-8"))["_class_name"]
                cls = getattr(diffusers, kind)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"Decoder: folder must have an autoencoder of diffusers, got {path}: {error}"
                ) from None
            self._vae = cls.from_pretrained(path, torch_dtype=self.dtype).to(self.device)
        return self._vae


def _decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """(1, 3, height, width), float32 or wider, about -1 .. 1; latents are scaled in float32 or wider."""
    kind, config = type(vae).__name__, vae.config
    wide = latents.to(torch.promote_types(vae.dtype, torch.float32))
    if kind == "AutoencoderKLQwenImage":
        mean, std = (
            torch.tensor(v, device=wide.device).view(-1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        raw = (wide * std + mean).unsqueeze(2)  # a frame axis
        pixels = vae.decode(raw.to(vae.dtype), return_dict=False)[0][:, :, 0]
    elif kind in ("AutoencoderKL", "AutoencoderDC"):
        raw = wide / config.scaling_factor + (config.get("shift_factor") or 0.0)
        pixels = vae.decode(raw.to(vae.dtype), return_dict=False)[0]
    else:
        raise ValueError(
            f"decode: folder must have an AutoencoderKL, AutoencoderKLQwenImage or AutoencoderDC as vae, got {kind}"
        )
    return pixels.to(wide.dtype)
