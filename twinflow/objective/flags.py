"""`parse_flags()`: the `twinflow_*` and `diff2flow_*` options of training config files, under their known names."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.suggest import did_you_mean, nearest


class Flag(NamedTuple):
    """An option of training configs.

    Args:
        default: its value where it is not given.
        type: bool, int, float or str.
        setting: of `TwinFlowConfig`; None: only the trainer reads it.
        help: a line.
    """

    default: Any
    type: type
    setting: str | None
    help: str


FLAGS = {name: Flag(*row) for name, row in {
    "twinflow_enabled":            (False, bool,  None,                 "train with TwinFlow, not plain flow matching"),
    "twinflow_target_step_count":  (1,     int,   "target_step_count",  "sampling steps in validation, 1 to 4"),
    "twinflow_estimate_order":     (2,     int,   "estimate_order",     "teacher steps of the rollout"),
    "twinflow_enhanced_ratio":     (0.5,   float, "enhanced_ratio",     "guidance to train in; 0: none"),
    "twinflow_delta_t":            (0.01,  float, "delta_t",            "first step of the rollout, in units of time"),
    "twinflow_target_clamp":       (1.0,   float, "target_clamp",       "bound of the target's residual"),
    "twinflow_require_ema":        (True,  bool,  None,                 "stop if there is no EMA to be the teacher"),
    "twinflow_allow_no_ema_teacher": (False, bool, None,                "let the student be its own teacher"),
    "twinflow_allow_diff2flow":    (False, bool,  None,                 "permit the bridge of diff2flow_enabled"),
    "twinflow_adversarial_enabled": (False, bool, "adversarial",        "train on the student's samples too"),
    "twinflow_adversarial_weight": (1.0,   float, "adversarial_weight", "factor of the adversarial term"),
    "twinflow_rectify_weight":     (1.0,   float, "rectify_weight",     "factor of the rectify term"),
    "twinflow_recipe":             ("all_terms", str, "recipe",       "all_terms (the paper) or partition (its code)"),
    "twinflow_step_focus":         (0.0,   float, "step_focus",         "share of times on the step count's grid"),
    "diff2flow_enabled":           (False, bool,  None,                 "read an epsilon or v prediction as a flow"),
    "diff2flow_loss":              (False, bool,  None,                 "no effect: the loss is of the flow anyway"),
}.items()}  # fmt: skip
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
        if name not in FLAGS:
            hint = did_you_mean([*map(repr, nearest(name, FLAGS, "twinflow_"))]) or f"known are {', '.join(FLAGS)}"
            raise ArgumentError("from_flags", "mapping", "known options", repr(name), hint, "hold")
    settings: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, (default, kind, setting, _) in FLAGS.items():
        value = mapping.get(name)
        value = default if value is None or value == "" else _convert(name, value, kind)
        if setting is not None:
            settings[setting] = value
        if setting is None or name in _IN_REST:
            rest[name] = value
    return settings, rest


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
