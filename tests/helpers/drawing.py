"""Draws from one noise: by a pipeline, and by `sample()` with a student, in the pipeline's layout."""

import torch
from diffusers import DiffusionPipeline
from helpers.tiny_pipelines import call_arguments, latent_shape

from twinflow.interface import Student
from twinflow.models import FlowModel
from twinflow.models.packing import pack, unpack
from twinflow.sampling import sample

PROMPTS = ["a red fox", "two dogs on a green hill"]
SEED = 7  # of the noise of the steps
PACKED = ("qwen_image", "flux", "flux_guidance")


def start(family: str) -> torch.Tensor:
    """Seeded noise for both prompts, as the pipeline takes it."""
    z = torch.randn(latent_shape(family, len(PROMPTS)), generator=torch.Generator().manual_seed(0))
    return pack(z) if family in PACKED else z


def fresh() -> torch.Generator:
    """The noise of the steps."""
    return torch.Generator().manual_seed(SEED)


def encoding(family: str) -> dict:
    """Options of a quick encoding of prompts, the same for pipelines and students."""
    if family == "sana":
        return {"complex_human_instruction": None}
    # T5 prompts are padded to it; the stock 512 and 256 tokens would be most of the work.
    return {"max_sequence_length": 32} if family in ("sd3", "flux", "flux_guidance") else {}


def arguments(family: str) -> dict:
    """A pipeline's arguments for a small image without guidance; FLUX's embedded scale as the student asks it."""
    scale = {"guidance_scale": 3.5} if family.startswith("flux") else {}
    return call_arguments(family) | scale | encoding(family)


def draw(pipe: DiffusionPipeline, family: str, steps: int = 2, **more: object) -> torch.Tensor:
    """The latents that a pipeline with a TwinFlowScheduler draws."""
    pipe.scheduler.set_generator(fresh())
    given = {"prompt": list(PROMPTS), "latents": start(family), "output_type": "latent"} | arguments(family) | more
    return pipe(num_inference_steps=steps, **given).images


def sampled(
    student: FlowModel,
    pipe: DiffusionPipeline,
    family: str,
    steps: int = 2,
    network: Student | None = None,
    **walk: object,
) -> torch.Tensor:
    """The latents that `sample()` draws from the same noise with a student, or with a network that stands for it."""
    network = network or student
    with torch.no_grad():
        cond = student.encode_prompt(pipe, list(PROMPTS), **encoding(family))
    size = latent_shape(family, 1)[2:]

    def packed(x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: dict) -> torch.Tensor:
        return pack(network(unpack(x, *size), t, r, cond))

    called = packed if family in PACKED else network
    return sample(called, start(family), cond, steps=steps, generator=fresh(), **walk)
