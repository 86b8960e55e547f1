"""`Sampler`: the images that a run draws on the way."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from twinflow.distributed import on_rank_zero
from twinflow.errors import ArgumentError
from twinflow.interface import Student, Teacher
from twinflow.models.packing import pack, unpack
from twinflow.models.registry import FAMILIES
from twinflow.scheduler import TwinFlowScheduler
from twinflow.teachers.teachers import EMATeacher
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.config.settings import TrainSettings
from twinflow.train.data.cache import on_device
from twinflow.train.data.decoder import Decoder
from twinflow.train.data.encoders import Condition
from twinflow.train.logging.sample_folder import GRID, write_samples
from twinflow.train.validation.eval_mode import eval_mode
from twinflow.train.validation.prompts import ValidationPrompts

COMPARED = (1, 2, 4)  # numbers of steps that are drawn beside the one that is trained for
BASE_STEPS, BASE_GUIDANCE = 30, 4.0


@dataclass(frozen=True)
class Method:
    """How an image is drawn.

    Args:
        steps: of the walk.
        style: `few`, as TwinFlow samples; `mul`, Euler steps.
        guidance: scale g of u + g (c - u), in effect above 1.
        shift: of the times.
    """

    steps: int
    style: str = "few"
    guidance: float = 0.0
    shift: float = 1.0

    @property
    def heading(self) -> str:
        """In words."""
        told = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        return f"{told}, guidance {self.guidance:g}" if self.guidance > 1 else told


class Sampler:
    """Draws the prompts of a run between its steps, with the same noise every time, and leaves no trace in the run.

    Prompt k has the seed `validation_seed` + k: `attach(pipe, export, seed=that)` and the pipeline's
    `generator=torch.Generator().manual_seed(that)` draw the same image. Under ranks every one makes the same calls;
    rank 0 decodes and writes.

    Args:
        autocast: makes the context of the student's calls.
        stop: asked after each image, on every rank: whether to give the drawing up.
    """

    def __init__(
        self,
        settings: TrainSettings,
        folder: Path,
        prompts: ValidationPrompts,
        run: RunFolder,
        device: torch.device,
        *,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._settings, self._prompts, self._run, self._device = settings, prompts, run, device
        self._autocast, self._stop = autocast, stop
        self._family = FAMILIES[prompts.family]
        self._shift = pipeline_shift(folder, prompts.latent_shape[1:], self._family.shift_patch)
        half = device.type != "cpu" and settings.mixed_precision == "bf16"
        self._decoder = Decoder(
            folder, self._family.autoencoder, device=device, dtype=torch.bfloat16 if half else torch.float32
        )

    @property
    def methods(self) -> list[Method]:
        """How images are drawn during training."""
        settings = self._settings
        if settings.twinflow is None:
            return [Method(settings.validation_num_inference_steps, "mul", settings.validation_guidance, self._shift)]
        return [Method(steps) for steps in sorted({settings.validation_num_inference_steps, *COMPARED})]

    def draw(self, step: int, student: Student, teacher: Teacher | None = None) -> str | None:
        """Draws after some steps, with the teacher where it is an average of the weights, else with the student.

        Args:
            student: wrapped or not.

        Returns:
            What was drawn, in words; None: it was given up, and nothing was written.

        Raises:
            FloatingPointError: images that are not finite.
            OSError: no room for them.
        """
        if isinstance(teacher, EMATeacher):
            return self._drawn(student, teacher, self.methods, step, "ema", f"EMA weights, step {step}")
        return self._drawn(student, None, self.methods, step, "student", f"student weights, step {step}")

    def base(self, student: Student) -> str | None:
        """Draws the untrained model as stock pipelines do: 30 Euler steps with guidance; for step 0 of a run.

        Args and Returns as for `draw`.
        """
        given = BASE_GUIDANCE if self._family.guidance is None else 0.0  # a distilled one has it in its weights
        method = Method(BASE_STEPS, "mul", self._settings.validation_guidance or given, self._shift)
        return self._drawn(student, None, [method], 0, "base", "base model, before training")

    def _drawn(
        self, student: Student, average: Student | None, methods: Sequence[Method], step: int, weights: str, told: str
    ) -> str | None:
        prompts = self._prompts
        latents = []
        with eval_mode(student, self._device) as plain, self._autocast():
            for number, cond in enumerate(prompts.conditions):
                seed = self._settings.validation_seed + number
                conditions = [on_device(c, self._device) for c in (cond, prompts.negative)]
                for method in methods:
                    latents.append(self._walk(average or plain, method, seed, *conditions).cpu())
                    if self._stop():
                        return None
        height, width = prompts.size
        folder = self._run.samples_at(None if weights == "base" else step)

        def write() -> str:
            images = []
            try:
                for number, found in enumerate(latents):
                    row, method = number // len(methods), methods[number % len(methods)]
                    seed = self._settings.validation_seed + row
                    about = {"prompt": prompts.texts[row], "steps": method.steps, "style": method.style}
                    about |= {"guidance": method.guidance, "seed": seed}
                    images.append((about, self._decoder.decode(found)[0]))
            finally:
                self._decoder.free()
            headings = [method.heading for method in methods]
            write_samples(folder, told, headings, images, step=step, weights=weights, width=width, height=height)
            return f"samples of the {told}: {folder / GRID}"

        return on_rank_zero("Sampler", write)

    def _walk(self, network: Student, method: Method, seed: int, cond: Condition, negative: Condition) -> torch.Tensor:
        """The latents (1, C, H, W) of one image, float32."""
        shape = self._prompts.latent_shape
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn((1, *shape), generator=generator).to(self._device)
        packed, fresh = self._family.packs_latents, generator if self._family.shares_generator else None
        euler = {} if method.style == "few" else {"stochasticity": 0.0, "gap_end": 0.0}
        scheduler = TwinFlowScheduler(shift=method.shift, style=method.style, seed=seed, **euler)
        scheduler.set_timesteps(method.steps)
        for timestep in scheduler.timesteps:
            t, r = (torch.full((1,), time, dtype=torch.float32, device=self._device) for time in scheduler.times())
            velocity = network(x, t, r, cond).float()
            if method.guidance > 1:
                away = network(x, t, r, negative).float()
                velocity = away + method.guidance * (velocity - away)
            state = (pack(velocity), timestep, pack(x)) if packed else (velocity, timestep, x)
            x = scheduler.step(*state, fresh).prev_sample
            x = unpack(x, *shape[1:]) if packed else x
        return x


def pipeline_shift(folder: Path, size: tuple[int, int], patch: int = 2) -> float:
    """The factor of docs/method.md, equation 34, that a pipeline's own scheduler applies; 1 where it shifts nothing.

    Schedulers that stretch their times to a last one (`shift_terminal`) shift by the same factor.

    Args:
        size: (H, W) of the latents.
        patch: latents along an edge of a token (`FlowModel.shift_patch`).

    Raises:
        ValueError: no settings of a scheduler there.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not config.get("use_dynamic_shifting"):
            return float(config.get("flow_shift", config.get("shift", 1.0)))
        first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = low + (high - low) * (size[0] * size[1] / patch**2 - first) / (last - first)
        return float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)
    except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        wanted = "a scheduler's settings"
        raise ArgumentError("pipeline_shift", "folder", wanted, f"{path}: {error}", verb="have") from None
