"""`parse_flags()`: the `twinflow_*` and `diff2flow_*` options of training config files, under their known names."""

import difflib
from collections.abc import Mapping
from typing import Any

from twinflow.errors import ArgumentError, ArgumentTypeError

# option -> (default, kind, setting of TwinFlowConfig or None where only the trainer reads it)
_FLAGS: dict[str, tuple[Any, type, str | None]] = {
    "twinflow_enabled":                (False, bool,  None),
    "twinflow_target_step_count":      (1,     int,   "target_step_count"),
    "twinflow_estimate_order":         (2,     int,   "estimate_order"),
    "twinflow_enhanced_ratio":         (0.5,   float, "enhanced_ratio"),
    "twinflow_delta_t":                (0.01,  float, "delta_t"),
    "twinflow_target_clamp":           (1.0,   float, "target_clamp"),
    "twinflow_require_ema":            (True,  bool,  None),
    "twinflow_allow_no_ema_teacher":   (False, bool,  None),
    "twinflow_allow_diff2flow":        (False, bool,  None),
    "twinflow_adversarial_enabled":    (False, bool,  "adversarial"),
    "twinflow_adversarial_weight":     (1.0,   float, "adversarial_weight"),
    "twinflow_rectify_weight":         (1.0,   float, "rectify_weight"),
    "twinflow_recipe":                 ("all_terms", str, "recipe"),
    "diff2flow_enabled":               (False, bool,  None),
    "diff2flow_loss":                  (False, bool,  None),
}  # fmt: skip
_IN_REST = ("twinflow_target_step_count",)  # both the objective and the trainer read it


def parse_flags(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits options into settings of the objective and options of the trainer.

    Args:
        mapping: option name -> value; None and "" mean the default, an explicit 0 is kept.

    Returns:
        (keyword arguments of TwinFlowConfig, option -> value of what the trainer reads), defaults filled.

    Raises:
        TypeError: no mapping is given.
        ValueError: an unknown name (the nearest is suggested) or a value that its kind cannot hold.
    """
    if not isinstance(mapping, Mapping):
        raise ArgumentTypeError("from_flags", "mapping", "a mapping of option to value", type(mapping).__name__)
    for name in map(str, mapping):
        if name not in _FLAGS:
            raise ArgumentError("from_flags", "mapping", "known options", repr(name), _suggestion(name), "hold")
    settings: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, (default, kind, setting) in _FLAGS.items():
        value = mapping.get(name)
        value = default if value is None or value == "" else _convert(name, value, kind)
        if setting is not None:
            settings[setting] = value
        if setting is None or name in _IN_REST:
            rest[name] = value
    return settings, rest


def _suggestion(name: str) -> str:
    nearest = difflib.get_close_matches(name, _FLAGS, n=1, cutoff=0.6)
    nearest = nearest or difflib.get_close_matches(f"twinflow_{name}", _FLAGS, n=1, cutoff=0.8)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(_FLAGS)}"


def _convert(name: str, value: Any, kind: type) -> Any:
    wanted = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[kind]
    words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    try:
        if kind is bool:
            return words[str(value).strip().lower()]
        if kind is str:
            return str(value)
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if kind is int and number != int(number):
            raise ValueError
        return kind(number)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ArgumentError("from_flags", name, wanted, repr(value)) from None
