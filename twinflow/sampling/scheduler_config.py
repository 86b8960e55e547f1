"""What a `TwinFlowScheduler` configuration means: checks, second names, and the form that JSON gives back."""

from collections.abc import Mapping
from typing import Any

from twinflow.sampling.grid import check_steps, is_number
from twinflow.sampling.sampler import SamplerConfig

_CHOICES = {"prediction_type": ("flow_matching", "flow_prediction"), "time_condition": ("t", "midpoint")}
_ALIASES = {"gap_start": "rfba_gap_start", "gap_end": "rfba_gap_end", "stochasticity": "stochast_ratio"}


def checked_walk(where: str, config: Mapping[str, Any]) -> SamplerConfig:
    """The walk of a scheduler's configuration; raises ValueError naming the setting that is out of its range."""
    check_steps(where, "num_train_timesteps", config["num_train_timesteps"])
    for name, choices in _CHOICES.items():
        if config[name] not in choices:
            raise ValueError(f"{where}: {name} must be one of {', '.join(choices)}, got {config[name]!r}")
    if type(config["seed"]) is not int or not 0 <= config["seed"] < 2**63:
        raise ValueError(f"{where}: seed must be an integer in [0, 2^63), got {config['seed']!r}")
    if type(config["use_pipeline_sigmas"]) is not bool:
        raise ValueError(f"{where}: use_pipeline_sigmas must be True or False, got {config['use_pipeline_sigmas']!r}")
    settings = {name: config[name] for name in ("style", "shift", "extrapolation", "order")}
    for name, alias in _ALIASES.items():
        settings[name] = _one_of(where, name, config[name], alias, config[alias])
    warp = config["time_dist_ctrl"]
    walk = SamplerConfig(time_dist_ctrl=(1.0, 1.0, 1.0) if warp is None else warp, **settings)
    walk.check(where)
    return walk


def _one_of(where: str, name: str, value: Any, alias: str, other: Any) -> Any:
    if value is not None and other is not None and value != other:
        raise ValueError(f"{where}: {alias} must be None or the value of {name}, {value!r}, got {other!r}")
    return other if value is None else value


def plain(value: Any) -> Any:
    """A setting as JSON gives it back: lists for tuples, Python floats for other numbers."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (bool, int)) or not is_number(value):
        return value
    return float(value)
