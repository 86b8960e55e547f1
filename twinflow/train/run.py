"""`train()`: a run from its settings: where it goes on, data, model, memory, and the loop."""

import json
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console

from twinflow.atomic_files import remove_partials, write_file
from twinflow.distributed import any_rank, on_rank_zero, world
from twinflow.environment import describe_environment
from twinflow.errors import ArgumentError, require
from twinflow.memory.modulation.layers import deferrable_layers
from twinflow.memory.presets import preset_of
from twinflow.memory.quantised_linear import LIBRARIES, load_library
from twinflow.train.callbacks import Callbacks, build_callbacks
from twinflow.train.checkpoint.checkpoint import (
    RETIRED,
    latest_checkpoint,
    named_checkpoint,
    read_checkpoint,
    read_summary,
    retire_later,
    write_checkpoint,
)
from twinflow.train.checkpoint.folder_lock import lock_folder, unlock_folder
from twinflow.train.config.describe import changed
from twinflow.train.config.resolve import read_config
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.config.settings import TrainSettings
from twinflow.train.data.cache import Cache, Entry, held_out
from twinflow.train.data.prepare import encoders_of, prepare_data, require_fitting, unread
from twinflow.train.logging.console import Display, plural_steps, say_log_of_twinflow
from twinflow.train.logging.quiet import without_loading_bars
from twinflow.train.logging.run_logger import RunLogger
from twinflow.train.logging.trackers import required_trackers
from twinflow.train.loop import Due
from twinflow.train.model.memory import after_out_of_memory
from twinflow.train.model.optimizer import renew, saved_kind
from twinflow.train.model.parallel import check_launcher, check_sharded, launcher_kind
from twinflow.train.model.pipeline_source import pipeline_folder
from twinflow.train.model.student import build_student
from twinflow.train.setup import Assembled, assemble, headline
from twinflow.train.signals import StopRequest, terminable
from twinflow.train.validation.prompts import ValidationPrompts, require_resolution, validation_prompts


class TrainingStopped(RuntimeError):
    """A run that cannot go on; the message says why, and where it stands."""

    exit_status = 1


def train(settings: TrainSettings, console: Console | None = None) -> int:
    """Trains to the last step, or until Ctrl-C or SIGTERM; the same settings go on where a run was left.

    Args:
        console: where it speaks; None: standard output.

    Returns:
        Steps taken by the run, in all.

    Raises:
        ValueError: settings, data or a model that cannot be trained with, or another process in the same folder.
        TrainingStopped: a loss that is not finite, or no memory left on the device.
        OSError: no room for caches or checkpoints; earlier checkpoints are whole.
    """
    settings.require_data()
    required_trackers(settings)
    check_launcher(settings)
    # One process encodes, perhaps for hours, while the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[patience])
    display = Display(console, accelerator.is_main_process)
    run = RunFolder(settings.output_dir)
    try:
        return _train(settings, run, accelerator, display)
    finally:
        unlock_folder(run.root)


def _train(settings: TrainSettings, run: RunFolder, accelerator: Accelerator, display: Display) -> int:
    checkpoint = _begin(settings, run, display)
    done = 0 if checkpoint is None else int(read_summary(checkpoint)["step"])
    if done >= settings.max_train_steps:
        display.say(f"{run.root} has taken its {plural_steps(done)}; raise max_train_steps to go on")
        return done
    folder = _pipeline(settings)
    require_trainable(settings, folder, accelerator)
    for warning in (*settings.warnings, *unread(settings)):
        display.say(f"warning: {warning}", style="yellow")
    with without_loading_bars(), _stoppable():
        with _room("encoding", accelerator.device, "lower vae_batch_size or text_batch_size"):
            cache, prompts = _encoded(settings, folder, accelerator, display)
        _tell(cache, display)
        entries, held = held_out(cache.entries, 0.0 if settings.data_free else settings.eval_share)
        parts = _assembled(settings, folder, (cache, entries), accelerator, display, checkpoint)
    with RunLogger(settings, run, parts.loop.step) as record, StopRequest() as stop:
        looks: dict[str, Any] = dict(folder=folder, prompts=prompts, data=(cache, held))
        asked = lambda: any_rank(bool(stop))  # noqa: E731
        checks = build_callbacks(settings, parts, record, display, stop=asked, **looks)
        _run(settings, run, parts, checks, asked)
    _part(settings, run, parts, display, stop)
    return parts.loop.step


def _assembled(
    settings: TrainSettings,
    folder: Path,
    data: tuple[Cache, list[Entry]],
    accelerator: Accelerator,
    display: Display,
    checkpoint: Path | None,
) -> Assembled:
    """The run's parts, as the checkpoint left them."""
    tree = None if checkpoint is None else read_checkpoint(checkpoint)
    advice = "`twinflow train --dry-run` shows what each memory_preset needs"
    with _room("loading the model", accelerator.device, advice), say_log_of_twinflow(display):
        parts = assemble(settings, folder, *data, accelerator, None if tree is None else saved_kind(tree))
    display.say(headline(settings, parts, len(data[1])))
    if tree is not None:
        state = parts.loop.state
        state.restore(tree)
        renew(settings, state.optimizer, state.scheduler)  # type: ignore[arg-type]
        display.say(f"going on after step {parts.loop.step}, from {checkpoint}")
        if not parts.loop.batches.knows(tree["ranks"][world()[0]]["batches"]):
            display.say(f"the data has changed since: its {len(data[1])} entries come in a new order from here on")
        root, step = settings.output_dir, parts.loop.step
        for name in on_rank_zero("train", lambda: "\n".join(retire_later(root, step))).splitlines():
            display.say(f"{name} is of the steps that are now taken anew; it stays as {name}{RETIRED}")
    return parts


def _encoded(
    settings: TrainSettings, folder: Path, accelerator: Accelerator, display: Display
) -> tuple[Cache, ValidationPrompts | None]:
    """The data, and the prompts of the samples; the encoders are gone afterwards."""
    encoders = encoders_of(settings, folder, accelerator.device)
    require_fitting(settings, encoders)
    if settings.validation_steps:
        require_resolution(settings, encoders)
    how: dict[str, Any] = dict(main_process=accelerator.is_main_process, wait=accelerator.wait_for_everyone)
    with encoders.kept():
        cache = prepare_data(settings, encoders, progress=display.caching, **how)
        if not settings.validation_steps:
            return cache, None
        return cache, validation_prompts(settings, cache, encoders, progress=display.caching, **how)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Before the steps, Ctrl-C and SIGTERM end the run at once; what was encoded is kept."""
    try:
        with terminable():
            yield
    except KeyboardInterrupt:
        raise TrainingStopped("stopped before its steps; the same command goes on") from None


@contextmanager
def _room(doing: str, device: torch.device, advice: str) -> Iterator[None]:
    """Says what to do where the device has no memory left."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingStopped(f"no memory left on {device} while {doing}: {advice}") from error


def _begin(settings: TrainSettings, run: RunFolder, display: Display) -> Path | None:
    """Takes the folder, finds the checkpoint to go on from, and writes the config down."""

    def take() -> str:
        folder = run.root.is_dir() or not run.root.exists()
        require(folder, "train", "output_dir", "a folder", f"the file {run.root}")
        try:
            lock_folder(run.root)
        except ArgumentError as error:
            raise error.renamed("train", "output_dir") from None
        remove_partials(run.root)
        return ""

    def write() -> str:
        write_file(run.config, settings.with_absolute_paths().to_json().encode())
        write_file(run.environment, json.dumps(describe_environment(world()[1]), indent=1).encode())
        return ""

    on_rank_zero("train", take)
    complaints: list[str] = []
    checkpoint = checkpoint_to_resume(settings, complaints)
    for complaint in complaints:
        display.say(f"warning: {complaint}", style="yellow")
    on_rank_zero("train", write)
    return checkpoint


def checkpoint_to_resume(settings: TrainSettings, complaints: list[str]) -> Path | None:
    """The checkpoint that a run goes on from; None: it begins.

    Args:
        settings: of the run, as it is asked for now.
        complaints: gets a line for each newer checkpoint that is damaged.

    Raises:
        ArgumentError: settings that would make it another run, checkpoints where it is to begin, or no such folder.
    """
    run, asked = RunFolder(settings.output_dir), settings.resume_from_checkpoint
    if asked in ("latest", "no"):
        found = latest_checkpoint(run.root, complaints if asked == "latest" else None)
    else:
        found = named_checkpoint(run.root, asked)
        if found is None:
            wanted = f"latest, no, a checkpoint of {run.root} or a folder"
            raise ArgumentError("train", "resume_from_checkpoint", wanted, repr(asked))
        run = RunFolder(found.absolute().parent)
    if found is not None and asked == "no":
        wanted, hint = "no checkpoints where resume_from_checkpoint is no", "choose another folder or remove them"
        raise ArgumentError("train", "output_dir", wanted, found, hint, verb="have")
    if found is not None and run.config.is_file():
        differences = changed(read_config(run.config, {}), settings)
        wanted, got = f"with what it began with in {run.root}", f"other settings: {'; '.join(differences)}"
        hint = "set them back, or choose another output_dir"
        require(not differences, "train", "a run", wanted, got, hint, verb="go on")
    return found


def require_trainable(settings: TrainSettings, folder: Path, accelerator: Any) -> None:
    """Builds the student without its weights, and looks for what its memory preset and its optimizer need.

    Seeds torch's global stream, as `build_student` does.

    Args:
        accelerator: accelerate's, for the kind of parallelism.

    Raises:
        ValueError: another family, layers that no LoRA can be put on, a base LoRA of another model, a preset that does
            not apply, or a launcher that is not supported.
        ImportError: a library is missing.
    """
    sharded = launcher_kind(accelerator) == "fsdp2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again when the weights are there
        student = build_student(settings, folder, weights=False)
    preset = None if settings.memory_preset == "auto" else preset_of(settings.memory_preset)
    if sharded:
        check_sharded(settings, student, preset)
    if preset is not None and preset.defer:
        deferrable_layers(student)
    if preset is not None and preset.base is not None:
        load_library(LIBRARIES[preset.base], "train")
    if "adamw8bit" in (settings.optimizer, None if preset is None else preset.optimizer):
        load_library("bitsandbytes", "train")


def _pipeline(settings: TrainSettings) -> Path:
    """Its folder; one process downloads, the others then find it."""
    name = settings.pretrained_model_name_or_path
    on_rank_zero("train", lambda: str(pipeline_folder(name)))
    return pipeline_folder(name)


def _tell(cache: Cache, display: Display) -> None:
    for warning in cache.warnings:
        display.say(f"warning: {warning}", style="yellow")
    for name, why in cache.skipped.items():
        display.say(f"left out: {name}: {why}", style="yellow")


def _run(
    settings: TrainSettings, run: RunFolder, parts: Assembled, checks: Callbacks, stop: Callable[[], bool]
) -> None:
    """The loop, and what can end it."""
    loop, keep = parts.loop, settings.checkpoints_total_limit or None

    def save(step: int) -> None:
        metadata = {"seconds": loop.state.extra["seconds"]}
        write_checkpoint(run.root, step, loop.state.collect(), keep=keep, metadata=metadata)

    due = Due(checks.record.steps, checks.evaluate, checks.draw, save)
    try:
        checks.begin(settings)
        loop.run(due, checks.display, stop)
    except FloatingPointError as error:
        raise TrainingStopped(f"{error}; {_standing(run)}; lower learning_rate or twinflow_target_clamp") from error
    except torch.OutOfMemoryError as error:
        said = after_out_of_memory(settings, parts.model, parts.memory, loop.device)
        raise TrainingStopped(f"no memory left on {loop.device}: {said}; {_standing(run)}") from error


def _part(settings: TrainSettings, run: RunFolder, parts: Assembled, display: Display, stop: StopRequest) -> None:
    """Says how the run ended, and what comes next."""
    step, folder = parts.loop.step, shlex.quote(str(run.root))
    if step < settings.max_train_steps:
        by = stop.signal or "a signal to another process"
        display.say(f"stopped by {by} after step {step}: saved; the same command goes on")
        return
    bridged = not parts.model.samples_in_pipelines
    after = f"export {folder}, or report" if bridged else f"sample {folder} --prompt ..., export or report"
    display.say(f"done: {plural_steps(step)}; next: twinflow {after}")


def _standing(run: RunFolder) -> str:
    """Where a run stands that cannot go on; asked of no other rank, as this one may be alone in trouble."""
    found = max(run.root.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return f"the last checkpoint is {found}" if found is not None else "there is no checkpoint yet"
