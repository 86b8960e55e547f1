"""`objective()`: the `TwinFlowConfig` that the options of a run ask for."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from twinflow.errors import ArgumentError, ArgumentTypeError, require
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.flags import FLAGS
from twinflow.suggest import did_you_mean, nearest
from twinflow.train.config.option_types import shown
from twinflow.train.config.presets import TrainPreset

_MOST_STEPS, _MOST_BITS = 1000, 1000
# Plain flow matching, E |F(x_t, t, t) - (z - x)|^2, in the objective's terms.
FLOW_MATCHING = TwinFlowConfig(
    recipe="all_terms", estimate_order=0, enhanced_ratio=0.0, adversarial=False, loss="l2", time_weight=False
)
_SETTINGS = tuple(field.name for field in fields(TwinFlowConfig))
_BY_RECIPE = ("loss", "rectify_loss", "time_weight")  # None: resolved by TwinFlowConfig's recipe
_FLAG_OF = {flag.setting: name for name, flag in FLAGS.items() if flag.setting}


def objective(
    options: Mapping[str, Any], preset: TrainPreset | None, data_free: bool
) -> tuple[TwinFlowConfig | None, dict[str, Any]]:
    """The objective, and the options that only the trainer reads.

    The `twinflow` mapping of a config file overrides a preset, and flags override both.

    Args:
        options: by name, those of the preset among them.
        preset: of `--preset`.
        data_free: whether there are prompts instead of images.

    Returns:
        The config, None without TwinFlow; and what `TwinFlowConfig.from_flags` leaves, defaults filled.

    Raises:
        ArgumentError: a value of the wrong kind, out of its range, or without effect.
    """
    flags = {name: _readable(name, options[name]) for name in FLAGS if name in options}
    settings = _settings(options.get("twinflow"))
    try:
        config, rest = TwinFlowConfig.from_flags(flags)
        if not rest["twinflow_enabled"]:
            require(not settings, "train", "twinflow", "absent where twinflow_enabled is false", "settings")
            require(not data_free, "train", "prompts_file", "given with TwinFlow only", "it without twinflow_enabled")
            return None, rest
        if preset is not None or settings:
            config = _overridden(config, flags, settings, preset)
        config = replace(config, target_clamp=None) if config.clamp == float("inf") else config
        config = replace(config, data_free=config.data_free or data_free)
    except OverflowError as error:
        raise ArgumentError("train", "twinflow", "numbers that fit", error, verb="hold") from None
    except (ArgumentError, ArgumentTypeError) as error:
        raise _of_option(error) from None
    steps = config.target_step_count
    require(steps <= _MOST_STEPS, "train", "twinflow_target_step_count", f"<= {_MOST_STEPS}", steps)
    return config, rest | {"twinflow_target_step_count": steps}


def _readable(name: str, value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ArgumentError("train", name, "a number that fits", shown(value))
    return value


def _settings(value: Any) -> dict[str, Any]:
    """The mapping of a file, or an object of JSON on the command line."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value is None or value == "":
        return {}
    if not isinstance(value, Mapping):
        raise ArgumentError("train", "twinflow", "an object of TwinFlowConfig's settings", shown(value))
    for name in value:
        if name not in _SETTINGS:
            hint = did_you_mean([*map(repr, nearest(str(name), _SETTINGS))]) or f"they are {', '.join(_SETTINGS)}"
            raise ArgumentError("train", "twinflow", "settings of TwinFlowConfig", shown(name), hint, "hold")
    return dict(value)


def _overridden(
    config: TwinFlowConfig, flags: Mapping[str, Any], settings: Mapping[str, Any], preset: TrainPreset | None
) -> TwinFlowConfig:
    """Settings of a preset and of the config file under those of the flags, which `config` has."""
    base = {} if preset is None else TwinFlowConfig.preset(preset.objective).to_dict()
    flagged = {setting: getattr(config, setting) for setting, flag in _FLAG_OF.items() if flag in flags}
    recipe = {**settings, **flagged}.get("recipe")
    if recipe is not None and recipe != base.get("recipe"):
        base |= dict.fromkeys(_BY_RECIPE)
    return TwinFlowConfig(**{**base, **settings, **flagged})


def _of_option(error: ArgumentError | ArgumentTypeError) -> ArgumentError:
    """An error of `TwinFlowConfig` as one of the command, its value on one line."""
    if error.function == "train":
        return ArgumentError(*error.args)
    name = error.argument
    if error.function.startswith("TwinFlowConfig"):
        name = _FLAG_OF.get(name, f"twinflow.{name}")
    got = " ".join(str(error.got).split())
    got = got if len(got) <= 80 else f"{got[:77]}..."
    return ArgumentError("train", name, error.wanted, got, error.hint, error.verb)
