"""`describe()`, `changed()`: settings in words, and what a resumed run may not change of them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from twinflow.objective.config import TwinFlowConfig
from twinflow.train.config.option_types import PATHS, Kind, absolute
from twinflow.train.config.settings import OPTIONS, TrainSettings

_FREE = ("check_finite",)  # of the objective: it changes no number


class Line(NamedTuple):
    """A setting in words, and whether it is not the default; without a name it is a sentence."""

    name: str
    value: str
    changed: bool = False

    def __str__(self) -> str:
        return f"{'* ' if self.changed else '  '}{self.name}{' = ' if self.name else ''}{self.value}"


def describe(settings: TrainSettings) -> str:
    """The settings by group, a line each, those that are not the default marked with `*`; then the warnings."""
    lines: list[str] = []
    for group, rows in grouped_lines(settings).items():
        lines += ["", group, *map(str, rows)]
    if settings.warnings:
        lines += ["", "warnings", *(f"! {warning}" for warning in settings.warnings)]
    return "\n".join(lines[1:])


def grouped_lines(settings: TrainSettings) -> dict[str, list[Line]]:
    """Group -> a line for each of its settings."""
    groups: dict[str, list[Line]] = {option.group: [] for option in OPTIONS.values()}
    for name, option in OPTIONS.items():
        if option.group != "TwinFlow":
            default = option.derived(vars(settings)) if option.derived else option.default
            groups[option.group].append(_line(name, getattr(settings, name), default))
    return {**groups, "TwinFlow": _objective(settings)}


def _line(name: str, value: object, default: object) -> Line:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else value
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {part:g}" for key, part in value.items())
    return Line(name, "-" if text in (None, "") else str(text), value != default)


def _objective(settings: TrainSettings) -> list[Line]:
    """The objective's settings beside those of no options at all, and what the step count does."""
    default, default_options = TwinFlowConfig.from_flags({})
    options = [_line(name, value, default_options[name]) for name, value in settings.twinflow_options.items()]
    config = settings.twinflow
    if config is None:
        return [Line("", "plain flow matching"), *(line for line in options if line.changed)]
    usual = default.to_dict()
    rows = [_line(name, value, usual[name]) for name, value in config.to_dict().items() if name != "target_step_count"]
    return [*options, *rows, Line("", step_guidance(config))]


def step_guidance(config: TwinFlowConfig) -> str:
    """What `target_step_count` does in training, in a sentence."""
    count, share = config.target_step_count, config.step_focus
    if not share:
        return f"step_focus 0: the step count {count} rules validation only, training sees every time (as published)"
    rows = "the `any` rows" if config.recipe == "partition" else "all rows"
    return f"step_focus {share:g}: {share:.0%} of {rows} take their times from the sampling grid of {count} step(s)"


def changed(old: TrainSettings, new: TrainSettings) -> list[str]:
    """What a resumed run would change and may not.

    Args:
        old, new: settings of the run as it was begun, and of the command that resumes it.

    Returns:
        A sentence for each; empty where the run can go on.
    """
    both_full = old.model_type == new.model_type == "full"
    fixed = [name for name, option in OPTIONS.items() if option.fixed and not (both_full and name.startswith("lora_"))]
    pairs: list[tuple[str, Any, Any]] = [(name, getattr(old, name), getattr(new, name)) for name in fixed]
    pairs = [pair for pair in pairs if not _same_place(OPTIONS[pair[0]].kind, *pair[1:])]
    for flag, before in old.twinflow_options.items():
        if flag != "twinflow_target_step_count":
            pairs.append((flag, before, new.twinflow_options[flag]))
    if old.twinflow is not None and new.twinflow is not None:
        was, now = old.twinflow.to_dict(), new.twinflow.to_dict()
        free = _FREE if was["step_focus"] else (*_FREE, "target_step_count")
        pairs += [(f"twinflow.{name}", was[name], now[name]) for name in was if name not in free]
    return [f"{name} was {_plain(was)} and is now {_plain(now)}" for name, was, now in pairs if was != now]


def _same_place(kind: Kind, old: Any, new: Any) -> bool:
    """Whether two paths are one, or the old one is gone and ends as the relative new one: the whole was moved."""
    if kind not in PATHS or old is None or new is None:
        return False
    was, ending = absolute(old), Path(new).parts
    moved = not (os.path.isabs(new) or os.path.exists(was)) and os.path.isabs(was)
    return was == absolute(new) or (moved and Path(was).parts[-len(ending) :] == ending)


def _plain(value: object) -> object:
    return "absent" if value in (None, "", ()) else value
