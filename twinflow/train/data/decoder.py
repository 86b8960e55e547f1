"""`Decoder`: latents -> pixels, by the autoencoder of a pipeline's folder: the inverse of `Encoders.images`."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twinflow.errors import ArgumentError
from twinflow.formats.variants import variant_of
from twinflow.models.autoencoders import Autoencoder


class Decoder:
    """The autoencoder of a pipeline, loaded when something must be decoded.

    Args:
        dtype: in which.
    """

    def __init__(
        self,
        folder: str | Path,
        autoencoder: type[Autoencoder],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self._autoencoder = autoencoder
        self._vae: Any = None

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents as `Encoders.images` gives them, as images; one at a time, which takes the least memory.

        Args:
            latents: (B, C, H, W), on any device.

        Returns:
            (B, height, width, 3), uint8, rounded as stock pipelines round.

        Raises:
            ValueError: an autoencoder of another kind.
            FloatingPointError: latents or images that are not finite.
        """
        vae = self._loaded()
        self._autoencoder.check(vae, "decode")
        images = []
        for row in latents.split(1):
            wide = row.to(self.device, torch.promote_types(vae.dtype, torch.float32))
            pixels = self._autoencoder.decode(vae, wide).to(wide.dtype)
            if not (row.isfinite().all() and pixels.isfinite().all()):
                raise FloatingPointError("latents and images must be finite, got others")
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
                wanted = "an autoencoder of diffusers"
                raise ArgumentError("Decoder", "folder", wanted, f"{path}: {error}", verb="have") from None
            self._vae = cls.from_pretrained(path, torch_dtype=self.dtype, variant=variant_of(path)).to(self.device)
        return self._vae
