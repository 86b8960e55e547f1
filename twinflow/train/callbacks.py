"""`Callbacks`: what looks at a run between its steps: the loss on held-out images, and samples."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinflow.train.config.run_folder import RunFolder
from twinflow.train.config.settings import TrainSettings
from twinflow.train.data.cache import Cache, Entry
from twinflow.train.logging.console import Display
from twinflow.train.logging.run_logger import RunLogger
from twinflow.train.setup import Assembled, autocast
from twinflow.train.validation.loss import Evaluation
from twinflow.train.validation.prompts import ValidationPrompts
from twinflow.train.validation.samples import Sampler


@dataclass
class Callbacks:
    """Looks at an assembled run; every rank makes the same calls.

    Args:
        record, display: get what is found.
        sampler, evaluation: None: there are no samples, no held-out images.
    """

    parts: Assembled
    record: RunLogger
    display: Display
    sampler: Sampler | None = None
    evaluation: Evaluation | None = None

    def begin(self, settings: TrainSettings) -> None:
        """Before the first step: samples of the base model, unless they are there or not wanted."""
        if self.sampler is None or settings.disable_benchmark or self.parts.loop.step:
            return
        self._shown(None, self.sampler.base(self.parts.loop.student))

    def evaluate(self, step: int) -> None:
        """The loss on the held-out images."""
        if self.evaluation is not None:
            found = self.evaluation.run(self.parts.loop.student, self.parts.teacher)
            images = f"{len(self.evaluation)} held-out image{'s' * (len(self.evaluation) > 1)}"
            self.display.say(f"step {step}: validation loss {found['loss']:.4g} on {images}")
            self.record.evaluation(step, found)

    def draw(self, step: int) -> None:
        """Samples."""
        if self.sampler is not None:
            self._shown(step, self.sampler.draw(step, self.parts.loop.student, self.parts.teacher))

    def _shown(self, step: int | None, told: str | None) -> None:
        """Says and records what was drawn, unless it was given up."""
        if told is not None:
            self.display.say(told)
            self.record.samples(step)


def build_callbacks(
    settings: TrainSettings,
    parts: Assembled,
    record: RunLogger,
    display: Display,
    *,
    folder: Path,
    prompts: ValidationPrompts | None,
    stop: Callable[[], bool],
    data: tuple[Cache, list[Entry]],
) -> Callbacks:
    """The checks that a run's settings ask for.

    Args:
        prompts: of its samples; None: there are none.
        data: the cache, and the entries held out.
    """
    device, (cache, held) = parts.loop.device, data
    how: dict[str, Any] = {"device": device, "autocast": lambda: autocast(settings, device)}
    run = RunFolder(settings.output_dir)
    sampler = None if prompts is None else Sampler(settings, folder, prompts, run, stop=stop, **how)
    evaluation = None
    if settings.eval_steps and held:
        evaluation = Evaluation(settings.objective, cache, held, seed=settings.validation_seed, **how)
    elif settings.eval_steps and not settings.data_free:
        share = f"eval_share {settings.eval_share:g} holds none of {len(cache.entries)} images out"
        display.say(f"no validation loss: {share}; a higher share would")
    return Callbacks(parts, record, display, sampler, evaluation)
