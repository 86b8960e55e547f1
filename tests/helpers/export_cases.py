"""Students with weights that depend on their names only, for the tests of exports."""

import zlib
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from helpers.tiny_pipelines import latent_shape, saved_pipeline, tiny_transformer
from safetensors import safe_open
from torch import nn

from twinflow.distributed import unwrap
from twinflow.lora import add_lora
from twinflow.models import FlowModel, load

FAMILIES = ("qwen_image", "sd3", "sana", "flux", "z_image")


def scrambled(student: nn.Module) -> nn.Module:
    """The same student; its trainable tensors now depend on their own names, without those of wrappers."""
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            plain = name.replace("_orig_mod.", "").replace("base_model.model.", "").replace("module.", "")
            generator = torch.Generator().manual_seed(zlib.crc32(plain.encode()))
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


def lora_student(family: str = "sd3", mode: str | None = "dual+sign", alpha: int = 6, **options: object) -> nn.Module:
    """A student with a LoRA of rank 4 and scaling 1.5."""
    return scrambled(add_lora(load(tiny_transformer(family)), 4, alpha=alpha, conditioning=mode, **options))


def whole_student(family: str = "sd3", mode: str | None = "dual+sign") -> nn.Module:
    """A student that trains all its weights."""
    return scrambled(load(tiny_transformer(family), conditioning=mode))


def velocity(student: FlowModel, family: str) -> torch.Tensor:
    """What a student answers to two rows of fixed latents, times and condition."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(latent_shape(family, 2), generator=generator)
    cond = {
        name: torch.randn(2, *[7] * (name == "prompt_embeds"), width, generator=generator)
        for name, width in unwrap(student).condition_widths().items()
    }
    with torch.no_grad():
        return student(x, torch.tensor([0.9, 0.4]), torch.zeros(2), cond)


def stock_pipeline(family: str) -> DiffusionPipeline:
    """The family's pipeline as it comes from disk."""
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline(family))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def contents(folder: Path) -> dict[str, object]:
    """File name -> what is in it; of safetensors the metadata and the bytes of each tensor, in no order."""
    found: dict[str, object] = {}
    for path in folder.iterdir():
        found[path.name] = path.read_bytes()
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                found[path.name] = (file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()})  # noqa: SIM118
    return found
