"""Training steps of real transformer classes on a CUDA device, transfers that come late, and times between events."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

from helpers.tiny_pipelines import latent_shape, tiny_transformer

from twinflow.lora import add_lora
from twinflow.models import FlowModel, load


def lora_student_and_batch(family: str, dtype=torch.bfloat16) -> tuple[FlowModel, tuple]:
    """A student of rank 4 on the device; latents, cond and uncond, the prompts' lengths on the host."""
    student = add_lora(load(tiny_transformer(family).to("cuda", dtype)), 4)
    latents = torch.randn(latent_shape(family, 4), device="cuda", dtype=dtype)

    def condition(rows: int) -> dict[str, torch.Tensor]:
        embeddings = {
            name: torch.randn(rows, *[7] * (name == "prompt_embeds"), width, device="cuda", dtype=dtype)
            for name, width in student.condition_widths().items()
        }
        return embeddings | {"prompt_lengths": torch.full((rows,), 5)}

    return student, (latents, condition(4), condition(1))


def delayed(method: Callable, stream: str) -> Callable:
    """A copy behind a few milliseconds of sleep on its own stream: whoever does not wait for it reads rubbish."""

    def late(self, *arguments):
        with torch.cuda.stream(getattr(self, stream)):
            torch.cuda._sleep(5_000_000)
        return method(self, *arguments)

    return late


def time_ms(work: Callable[[], object], repeats: int = 5) -> float:
    """Median of a few runs between CUDA events."""
    times = []
    for _ in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times[2:])[repeats // 2]
