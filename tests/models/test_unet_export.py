"""A bridged UNet's LoRA goes out as a file that the stock Stable Diffusion pipeline takes."""

import torch
from diffusers import DiffusionPipeline
from helpers.tiny_pipelines import latent_shape, saved_pipeline
from safetensors.torch import load_file

from twinflow.export import export
from twinflow.lora import add_lora
from twinflow.models import load


def test_a_unet_lora_in_the_stock_pipeline(tmp_path):
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline("sd15"))
    opted = dict(diff2flow_enabled=True, twinflow_allow_diff2flow=True)
    student = add_lora(load(pipe.unet, scheduler=pipe.scheduler, **opted), 4, conditioning="midpoint")
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    folder = export(student, tmp_path / "lora")
    names = load_file(folder / "pytorch_lora_weights.safetensors")
    assert names and all(name.startswith("unet.") for name in names)
    stock = DiffusionPipeline.from_pretrained(saved_pipeline("sd15"))
    x, prompt = torch.randn(latent_shape("sd15", 2)), student.encode_prompt(pipe, ["a cat", "a dog"])["prompt_embeds"]
    with torch.no_grad():
        plain = stock.unet(x, 500, prompt).sample
        stock.load_lora_weights(folder)
        found, expected = stock.unet(x, 500, prompt).sample, student.transformer(x, 500, prompt).sample
    assert torch.equal(found, expected) and not torch.allclose(found, plain, atol=1e-3)
