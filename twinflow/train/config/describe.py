"""What a resolved config looks like, and what a resumed run may not change."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from twinflow.objective.config import TwinFlowConfig
from twinflow.train.config.options import OPTIONS
from twinflow.train.config.resolve import DERIVED

if TYPE_CHECKING:
    from twinflow.train.config.settings import TrainSettings

# Options whose change would make a resumed run another run.
_FIXED = (
    "pretrained_model_name_or_path", "model_family", "model_type", "prediction_type", "lora_rank", "lora_alpha",
    "lora_layers", "base_lora", "conditioning", "instance_data_dir", "prompts_file", "metadata_file",
    "caption_strategy", "caption_column", "image_column", "unconditional_prompt", "resolution", "aspect_buckets",
    "aspect_bucket_alignment", "eval_share", "train_batch_size", "gradient_accumulation_steps", "seed",
    "mixed_precision", "optimizer", "use_ema", "ema_decay",
)  # fmt: skip
_FREE = ("check_finite",)  # of the objective
_FIXED_FLAGS = ("twinflow_require_ema", "twinflow_allow_no_ema_teacher", "twinflow_allow_diff2flow")


class Line(NamedTuple):
    """A setting in words, and whether it is not the default; without a name it is a sentence."""

    name: str
    value: str
    changed: bool = False

    def __str__(self) -> str:
        return f"{'* ' if self.changed else '  '}{self.name}{' = ' if self.name else ''}{self.value}"


def described(settings: "TrainSettings") -> dict[str, list[Line]]:
    """The settings by group; a mapping from each group to its lines."""
    groups = dict.fromkeys(option.group for option in OPTIONS.values())
    return {group: _objective(settings) if group == "TwinFlow" else _group(settings, group) for group in groups}


def describe(settings: "TrainSettings") -> str:
    """The settings by group, a line each, those that are not the default marked with `*`; then the warnings."""
    lines: list[str] = []
    for group, own in described(settings).items():
        lines += ["", group, *map(str, own)]
    if settings.warnings:
        lines += ["", "warnings", *(f"! {warning}" for warning in settings.warnings)]
    return "\n".join(lines[1:])


def _line(name: str, value: object, default: object) -> Line:
    shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
    if isinstance(value, Mapping):
        shown = ", ".join(f"{key} {part:g}" for key, part in value.items())
    return Line(name, "-" if shown in (None, "") else str(shown), value != default)


def _group(settings: "TrainSettings", group: str) -> list[Line]:
    found = []
    for option in OPTIONS.values():
        if option.group == group:
            value = getattr(settings, option.name)
            default = DERIVED[option.name](vars(settings)) if option.name in DERIVED else option.default
            found.append(_line(option.name, value, default))
    return found


def _objective(settings: "TrainSettings") -> list[Line]:
    """The objective's settings beside those of no options at all, and what the step count does."""
    options, defaults = settings.twinflow_options, TwinFlowConfig.from_flags({})
    plain = [_line(name, value, defaults[1][name]) for name, value in options.items()]
    config = settings.twinflow
    if config is None:
        return [Line("", "plain flow matching"), *[line for line in plain if line.changed]]
    usual = defaults[0].to_dict()
    own = [_line(name, value, usual[name]) for name, value in config.to_dict().items() if name != "target_step_count"]
    return [*plain, *own, Line("", step_guidance(config))]


def step_guidance(config: TwinFlowConfig) -> str:
    """What `target_step_count` does in training, in a sentence."""
    count, share = config.target_step_count, config.step_focus
    if not share:
        return f"step_focus 0: the step count {count} rules validation only, training sees every time (as published)"
    rows = "the `any` rows" if config.recipe == "partition" else "all rows"
    return f"step_focus {share:g}: {share:.0%} of {rows} take their times from the sampling grid of {count} step(s)"


def changed(old: "TrainSettings", new: "TrainSettings") -> list[str]:
    """What a resumed run would change and may not.

    Args:
        old, new: settings of the run as it was begun, and as it is asked for.

    Returns:
        A sentence for each; empty where the run can go on.
    """
    pairs: list[tuple[str, Any, Any]] = [(name, getattr(old, name), getattr(new, name)) for name in _FIXED]
    if old.model_type == new.model_type == "full":
        pairs = [pair for pair in pairs if not pair[0].startswith("lora_")]
    for flag, was in old.twinflow_options.items():
        if flag.startswith("diff2flow_") or flag in ("twinflow_enabled", *_FIXED_FLAGS):
            pairs.append((flag, was, new.twinflow_options[flag]))
    if old.twinflow is not None and new.twinflow is not None:
        before, after = old.twinflow.to_dict(), new.twinflow.to_dict()
        free = _FREE if before["step_focus"] else (*_FREE, "target_step_count")
        pairs += [(f"twinflow.{name}", before[name], after[name]) for name in before if name not in free]
    return [f"{name} was {_plain(was)} and is now {_plain(now)}" for name, was, now in pairs if was != now]


def _plain(value: object) -> object:
    return "absent" if value in (None, "", ()) else value
