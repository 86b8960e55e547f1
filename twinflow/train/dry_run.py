"""`dry_run()`: the resolved settings, the plan of a step and the forecast of its memory, before anything is loaded."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from twinflow.errors import ArgumentError
from twinflow.interface import Teacher
from twinflow.memory.presets import MemoryPreset
from twinflow.objective.loss import TwinFlowLoss
from twinflow.teachers.teachers import StudentTeacher
from twinflow.train.config.describe import describe
from twinflow.train.config.settings import TrainSettings
from twinflow.train.data.prepare import encoders_of, items_of, require_fitting
from twinflow.train.model.memory import workload_of_published, workload_of_run
from twinflow.train.model.pipeline_source import configurations
from twinflow.train.model.student import build_student

if TYPE_CHECKING:
    from twinflow.memory.planner.workload import Workload

_CALLS = 24  # of a plan that are shown


def dry_run(settings: TrainSettings, console: Console) -> None:
    """Prints what a run would do; loads no weights, encodes nothing and writes nothing.

    Raises:
        ValueError: data that cannot be trained on, or a model that does not go with the settings.
    """
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(describe(settings))
    say("\ndata")
    say(_data(settings))
    say("\nplan of a step")
    say(step_plan(settings))
    say("\nmemory")
    try:
        folder = configurations(settings.pretrained_model_name_or_path)
    except ArgumentError as error:
        workload = workload_of_published(settings)
        if workload is None:
            return say(f"  no forecast: {error.without_function}")
        say(f"  the model is not here; forecast by the published architecture of {workload.architecture.name}")
        return _forecast(settings, lambda: workload, console, say)
    if (folder / "vae" / "config.json").is_file():
        require_fitting(settings, encoders_of(settings, folder, torch.device("cpu")))
    student = build_student(settings, folder, weights=False)
    _forecast(settings, lambda: workload_of_run(settings, student), console, say)


def _data(settings: TrainSettings) -> str:
    try:
        settings.require_data()
    except ArgumentError as error:
        return f"  none yet: {error.without_function}"
    items = items_of(settings)
    kind = "prompts without images" if settings.data_free else "images with captions"
    rows = settings.step_rows
    epochs = settings.max_train_steps * rows / len(items)
    passes = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.2g}"
    return (
        f"  {len(items)} {kind}; {rows} rows a step on each process ({settings.train_batch_size} at a time), "
        f"{passes} epochs in {settings.max_train_steps} steps on one process"
    )


def step_plan(settings: TrainSettings) -> str:
    """The calls of the first step on one process, the first ones where there are many."""
    criterion = TwinFlowLoss(settings.objective)
    draws = criterion.draw(torch.zeros(settings.step_rows, 1, 1, 1), torch.Generator().manual_seed(settings.seed))
    teacher: Teacher = Teacher() if settings.use_ema else StudentTeacher(lambda x_t, t, r, cond: x_t)
    guided = settings.objective.enhanced_ratio > 0
    plan = criterion.plan(draws, teacher=teacher, has_uncond=guided, micro_batch=settings.train_batch_size)
    head, names, *calls, total = str(plan).split("\n")
    shown = calls[:_CALLS] + ([f"... {len(calls) - _CALLS} more calls"] if len(calls) > _CALLS else [])
    return "\n".join(f"  {line}" for line in (head, names, *shown, total))


def _forecast(
    settings: TrainSettings, workload: Callable[[], "Workload"], console: Console, say: Callable[[str], None]
) -> None:
    """The presets that apply and their peaks; of a named one, its own."""
    from twinflow.memory.planner.forecast import Planner

    try:
        planner = Planner(workload())
    except ArgumentError as error:
        return say(f"  no forecast: {error.without_function}")
    usable = torch.cuda.mem_get_info()[0] / 1e9 if torch.cuda.is_available() else None
    named = settings.memory_preset
    presets: list[MemoryPreset] = [p for p in planner.presets.values() if named in ("auto", p.name)]
    if not presets:
        return say(f"  no forecast: memory_preset {named} does not apply to this model")
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("memory preset")
    shown.add_column("peak GB", justify="right")
    shown.add_column("host GB", justify="right")
    shown.add_column("" if usable is None else f"within {usable:.1f} GB")
    chosen = False
    for preset in presets:
        try:
            with console.status(f"forecast of {preset.name} ..."):
                found = planner.forecast(preset)
        except ArgumentError as error:
            return say(f"  no forecast: {error.without_function}")
        fits = "" if usable is None else ("yes" if found.fits(usable) else "no")
        first = fits == "yes" and not chosen and named == "auto"
        chosen = chosen or fits == "yes"
        shown.add_row(
            ("> " if first else "  ") + preset.name, f"{found.peak / 1e9:.3g}",
            f"{found.host_bytes / 1e9:.3g}" if found.host_bytes else "", fits, style="bold" if first else None,
        )  # fmt: skip
    console.print(shown)
    if usable is None and named == "auto":
        say("  no CUDA device here: on one, memory_preset auto takes the first of these that fits")
