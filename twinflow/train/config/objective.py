"""`objective()`: the `TwinFlowConfig` that the options of a run ask for."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from twinflow.objective.config import TwinFlowConfig
from twinflow.train.config.option_types import shown
from twinflow.train.config.options import OPTIONS
from twinflow.train.config.presets import TrainPreset

_SETTINGS = tuple(field.name for field in fields(TwinFlowConfig))
_MOST_STEPS = 1000
# Plain flow matching, E |F(x_t, t, t) - (z - x)|^2, in the objective's terms.
FLOW_MATCHING = TwinFlowConfig(
    recipe="all_terms", estimate_order=0, enhanced_ratio=0.0, adversarial=False, loss="l2", time_weight=False
)
_BY_RECIPE = ("loss", "rectify_loss", "time_weight")  # None: resolved by TwinFlowConfig's recipe
_FLAGS = tuple(
    name for name in OPTIONS if name.startswith(("twinflow_", "diff2flow_")) and name != "twinflow_step_focus"
)
_FLAG_OF = {setting: f"twinflow_{setting}" for setting in _SETTINGS if f"twinflow_{setting}" in OPTIONS}
_FLAG_OF["adversarial"] = "twinflow_adversarial_enabled"


def objective(
    given: Mapping[str, Any], recipe: TrainPreset | None, data_free: bool
) -> tuple[TwinFlowConfig | None, dict[str, Any]]:
    """The objective, and the options that only the trainer reads.

    A recipe is overridden by the `twinflow` mapping of a config file, and that by the options.

    Args:
        given: options by name, those of the recipe among them.
        recipe: of `--preset`.
        data_free: whether there are prompts instead of images.

    Returns:
        The config, None without TwinFlow; and what `TwinFlowConfig.from_flags` leaves, defaults filled.

    Raises:
        ValueError: a value of the wrong kind, out of its range, or without effect.
    """
    flags = {name: given[name] for name in _FLAGS if name in given}
    try:
        config, options = TwinFlowConfig.from_flags(_readable(flags))
        own = _own(given.get("twinflow"))
        if not options["twinflow_enabled"]:
            _require_none(own, data_free)
            return None, options
        if recipe is not None or own:
            config = _overridden(config, flags, own, recipe)
        config = replace(config, step_focus=given.get("twinflow_step_focus", config.step_focus))
        config = replace(config, target_clamp=None) if config.clamp == float("inf") else config
        if config.target_step_count > _MOST_STEPS:
            raise ValueError(f"twinflow_target_step_count must be <= {_MOST_STEPS}, got {config.target_step_count}")
        config = replace(config, data_free=config.data_free or data_free)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(_message(error)) from None
    return config, options | {"twinflow_target_step_count": config.target_step_count}


def _readable(flags: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises ValueError for integers that could not be shown."""
    for name, value in flags.items():
        if isinstance(value, int) and value.bit_length() > 1000:
            raise ValueError(f"train: {name} must be a number that fits, got {shown(value)}")
    return flags


def _own(mapping: Any) -> dict[str, Any]:
    if mapping is None or mapping == "":
        return {}
    if not isinstance(mapping, Mapping):
        raise ValueError(f"train: twinflow must be an object of TwinFlowConfig's settings, got {shown(mapping)}")
    for name in mapping:
        if name not in _SETTINGS:
            raise ValueError(f"train: twinflow must hold {', '.join(_SETTINGS)}, got {shown(name)}")
    return dict(mapping)


def _require_none(own: Mapping[str, Any], data_free: bool) -> None:
    if own:
        raise ValueError("train: twinflow must be absent where twinflow_enabled is false, got settings")
    if data_free:
        raise ValueError("train: prompts_file must be given with TwinFlow only, got it with twinflow_enabled false")


def _overridden(
    config: TwinFlowConfig, flags: Mapping[str, Any], own: Mapping[str, Any], recipe: TrainPreset | None
) -> TwinFlowConfig:
    """Settings of a recipe and of the config file under those of the flags, which `config` has."""
    found = {} if recipe is None else TwinFlowConfig.preset(recipe.objective).to_dict()
    asked = {setting: getattr(config, setting) for setting, flag in _FLAG_OF.items() if flag in flags}
    chosen = {**own, **asked}.get("recipe")
    if chosen is not None and chosen != found.get("recipe"):
        found |= dict.fromkeys(_BY_RECIPE)
    return TwinFlowConfig(**{**found, **own, **asked})


def _message(error: Exception) -> str:
    """An error of `TwinFlowConfig` as one of the command, on one line."""
    text = " ".join(str(error).split()).removeprefix("from_flags: ")
    text = text if len(text) <= 400 else f"{text[:397]}..."
    setting = text.removeprefix("TwinFlowConfig: ")
    if isinstance(error, OverflowError):
        return f"train: twinflow must hold numbers that fit, got {text}"
    if setting != text:
        name, _, rest = setting.partition(" ")
        return f"train: {_FLAG_OF.get(name, f'twinflow.{name}')} {rest}"
    return text if text.startswith("train: ") else f"train: {text}"
