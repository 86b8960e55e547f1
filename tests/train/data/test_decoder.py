"""Images decoded as the stock pipelines decode them."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.drawing import PACKED, arguments
from helpers.tiny_pipelines import image_size, latent_shape, saved_pipeline

from twinflow.models.autoencoders import Autoencoder
from twinflow.models.packing import unpack
from twinflow.models.registry import FAMILIES as KNOWN
from twinflow.train.data.decoder import Decoder
from twinflow.train.data.encoders import encode_images

FAMILIES = ("sd3", "qwen_image", "sana", "flux", "z_image", "sd15")


def kind(family: str) -> type[Autoencoder]:
    return KNOWN["unet" if family == "sd15" else family].autoencoder


def stock(family: str) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline(family))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_the_stock_pipelines(family):
    """The latents and the image of one call, of the pipeline's own scheduler."""
    pipe = stock(family)
    call = {"prompt": "a red fox", "num_inference_steps": 2} | arguments(family)
    latents, expected = (
        pipe(**call, output_type=form, generator=torch.Generator().manual_seed(0)).images for form in ("latent", "np")
    )
    shape = latent_shape(family, 1)
    latents = unpack(latents, *shape[2:]) if family in PACKED else latents.reshape(shape)
    found = Decoder(saved_pipeline(family), kind(family)).decode(latents)
    assert found.dtype == np.uint8 and found.shape == (1, *image_size(family), 3) and found.std() > 5
    wanted = (expected * 255).round().astype(np.uint8)
    assert np.abs(found.astype(int) - wanted).max() <= 1 and (found != wanted).mean() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_undoes_the_scaling_of_encoding(family, monkeypatch):
    """What reaches the autoencoder's decoder is what its encoder gave."""
    pipe, decoder = stock(family), Decoder(saved_pipeline(family), kind(family))
    heard = []
    vae = decoder._loaded()
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **more: heard.append(z) or decode(z, **more))
    pixels = torch.rand(2, 3, *image_size(family)) * 2 - 1
    decoder.decode(encode_images(pipe, pixels, kind(family)))
    with torch.no_grad():
        raw = pipe.vae.encode(pixels.unsqueeze(2) if family == "qwen_image" else pixels)
    raw = raw.latent if family == "sana" else raw.latent_dist.mode()
    torch.testing.assert_close(torch.cat(heard), raw, rtol=1e-5, atol=1e-5)


def test_it_is_loaded_when_needed_and_let_go(tmp_path):
    decoder = Decoder(saved_pipeline("sd3"), Autoencoder, dtype=torch.bfloat16)
    latents = torch.randn(latent_shape("sd3", 3), generator=torch.Generator().manual_seed(0))
    assert decoder._vae is None
    together = decoder.decode(latents)
    assert decoder._vae.dtype == torch.bfloat16
    decoder.free()
    assert decoder._vae is None
    assert np.array_equal(together[1:2], decoder.decode(latents[1:2]))
    whole = Decoder(saved_pipeline("sd3"), Autoencoder).decode(latents)
    assert 0 < np.abs(together.astype(int) - whole).mean() < 4


def test_what_cannot_be_decoded(tmp_path):
    with pytest.raises(FloatingPointError, match="must be finite"):
        Decoder(saved_pipeline("sd3"), Autoencoder).decode(torch.full(latent_shape("sd3", 1), float("nan")))
    with pytest.raises(ValueError, match="must have an autoencoder of diffusers, got"):
        Decoder(tmp_path, Autoencoder).decode(torch.zeros(latent_shape("sd3", 1)))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny", "latent_channels": 4}))
    from diffusers import AutoencoderTiny

    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "vae")  # fmt: skip
    with pytest.raises(ValueError, match="vae must be AutoencoderKL, got AutoencoderTiny"):
        Decoder(tmp_path, Autoencoder).decode(torch.zeros(1, 4, 8, 8))
