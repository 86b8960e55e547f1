"""`TwinFlowConfig`: every choice of the objective, checked and resolved in one place."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.objective.flags import parse_flags

RECIPES = ("partition", "all_terms")
ROLES = ("e2e", "mul", "any", "one", "adv")  # docs/method.md, equation 4
LOSSES = ("barron", "l2")

# What a None means, by recipe: the published training code (partition) and the paper (all_terms).
_BY_RECIPE: dict[str, dict[str, Any]] = {
    "partition": {"loss": "barron", "time_weight": True, "rectify_weight": 0.5},
    "all_terms": {"loss": "l2", "time_weight": False, "rectify_weight": 1.0},
}

# Objective settings of the published configurations; models are named as in the paper's Table 6.
# name             recipe       order ratio rectify  shares e2e mul any one adv  data_free
_PRESETS = {
    "published":   ("partition", 2,   0.5,  0.5,    (1, 1, 1, 0, 1), False),
    "paper":       ("all_terms", 2,   0.5,  1.0,    (1, 1, 1, 0, 1), False),
    "sana-0.6b":   ("partition", 2,   0.5,  0.5,    (1, 1, 1, 0, 1), False),
    "sana-1.6b":   ("partition", 2,   0.5,  0.5,    (1, 1, 1, 0, 1), False),
    "openuni-512": ("partition", 2,   0.8,  0.75,   (1, 1, 1, 0, 1), False),
    "sd3.5-medium": ("partition", 2,  0.8,  0.5,    (1, 1, 1, 0, 1), False),
    "qwen-image-lora": ("partition", 2, 0.8, 0.5,   (1, 1, 1, 0, 1), False),
    "qwen-image-full": ("partition", 2, 0.8, 0.5,   (1, 1, 1, 0, 1), False),
    "qwen-image-edit": ("partition", 2, 0.8, 0.5,   (1, 1, 1, 0, 1), False),
    "lora-order1": ("partition", 1,   4.0,  0.5,    (1, 1, 1, 1, 1), False),
    "data-free":   ("partition", 2,   4.0,  0.5,    (1, 1, 1, 0, 1), True),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TwinFlowConfig:
    """The objective's settings; docs/method.md holds the equations they enter.

    Settings given as None are resolved by recipe when the config is made; `dataclasses.replace` keeps the results.

    Args:
        recipe: `partition` (one role per row, the published training code) or `all_terms` (the paper's objective).
        shares: role -> share of the rows, `partition` only; missing roles have share 0; scaled to sum to 1.
        adversarial: False leaves out the fake trajectory: the `adv` rows and every term built on generated samples.
        estimate_order: teacher steps N of the RCGM rollout; 0 is flow matching without a rollout.
        enhanced_ratio: guidance w of the enhanced target; 0 asks no guidance queries and needs no `uncond`.
        enhanced_range: open interval (lo, hi) of |t| in which rows are enhanced; `all_terms` includes hi.
        delta_t: first step of the rollout, in units of time.
        target_clamp: bound of the residual per element; None or inf for none.
        loss: `barron` or `l2`; None: by recipe.
        rectify_loss: loss of the rectify term; None: the same as `loss`, as published. `l2` keeps networks stable
            that diverge with the published form; where they do not it costs some quality (docs/experiments.md).
        barron_alpha, barron_c: shape and scale of the Barron loss.
        time_weight: weight the consistency rows by tan((1 - (|t| - |r|)) pi / 2.5) + 1; None: by recipe.
        time_dist: (a, b, scale): t ~ Beta(a, b) * scale.
        real_velocity_weight, adversarial_weight, rectify_weight, consistency_weight: factors of the terms
            (`partition` has no real-velocity and consistency terms); rectify None: by recipe.
        target_step_count: the number of sampling steps that `step_focus` trains for.
        step_focus: share of the `any` rows (`all_terms`: of all rows) that take their times from the sampling grid of
            `target_step_count` steps; 0 is the published method. Keep it well below 1: times off the grid need
            training too (`all_terms` on digits diverges at 1).
        data_free: the caller's latents give only shape, dtype and device; data are the student's own samples.
        rng_align: `batch`: each network call starts from the random state the student's call starts from; `rows`:
            rows run singly from states of their own, so that dropout masks of a row agree in all its calls.
        check_finite: raise FloatingPointError naming term and rows on a non-finite loss (one host sync per step).

    Raises:
        ValueError, TypeError: a value is out of its range or of the wrong kind.
    """

    recipe: str = "partition"
    shares: Mapping[str, float] = field(
        default_factory=lambda: {"e2e": 1.0, "mul": 1.0, "any": 1.0, "one": 0.0, "adv": 1.0}, hash=False
    )
    adversarial: bool = True
    estimate_order: int = 2
    enhanced_ratio: float = 0.5
    enhanced_range: tuple[float, float] = (0.0, 1.0)
    delta_t: float = 0.01
    target_clamp: float | None = 1.0
    loss: str = None  # type: ignore[assignment]  # resolved by recipe
    rectify_loss: str = None  # type: ignore[assignment]
    barron_alpha: float = 1.0
    barron_c: float = 1e-3
    time_weight: bool = None  # type: ignore[assignment]
    time_dist: tuple[float, float, float] = (1.0, 1.0, 1.0)
    real_velocity_weight: float = 1.0
    adversarial_weight: float = 1.0
    rectify_weight: float = None  # type: ignore[assignment]
    consistency_weight: float = 1.0
    target_step_count: int = 1
    step_focus: float = 0.0
    data_free: bool = False
    rng_align: str = "batch"
    check_finite: bool = False

    def __post_init__(self) -> None:
        _require_choice("recipe", self.recipe, RECIPES)
        resolved = dict(_BY_RECIPE[self.recipe])
        if self.rectify_loss is None:
            resolved["rectify_loss"] = self.loss or resolved["loss"]
        for name, value in resolved.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "shares", _checked_shares(self.shares, self.adversarial))
        for name in ("enhanced_range", "time_dist"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        _check(self)

    @property
    def clamp(self) -> float:
        """The residual's bound per element; inf where there is none."""
        return math.inf if self.target_clamp is None else float(self.target_clamp)

    def active_shares(self) -> dict[str, float]:
        """Role -> share, scaled to sum to 1, without roles that never run."""
        total = sum(self.shares.values())
        return {role: share / total for role, share in self.shares.items() if share > 0}

    @classmethod
    def from_flags(cls, mapping: Mapping[str, Any]) -> "tuple[TwinFlowConfig, dict[str, Any]]":
        """Reads `twinflow_*` and `diff2flow_*` options of a training config.

        Args:
            mapping: option name -> value; None and "" mean the default, an explicit 0 is kept.

        Returns:
            The config, and the options that concern the trainer (EMA, bridge and step count) by name, defaults filled.

        Raises:
            TypeError: no mapping is given.
            ValueError: an unknown name (the nearest is suggested) or a value of the wrong kind.
        """
        settings, rest = parse_flags(mapping)
        return cls(**settings), rest

    @classmethod
    def preset(cls, name: str) -> "TwinFlowConfig":
        """The objective of a shipped configuration, by name; ValueError lists the names."""
        _require_choice("name", name, tuple(_PRESETS), where="TwinFlowConfig.preset")
        recipe, order, ratio, rectify, shares, data_free = _PRESETS[name]
        return cls(
            recipe=recipe, estimate_order=order, enhanced_ratio=ratio, rectify_weight=rectify,
            shares=dict(zip(ROLES, shares, strict=True)), data_free=data_free,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Every setting, resolved, as JSON-able values."""
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in vars(self).items()}

    def __str__(self) -> str:
        lines = [f"  {name} = {value}" for name, value in self.to_dict().items()]
        return "\n".join(["TwinFlowConfig", *lines])


def _error(name: str, wanted: str, value: object, where: str = "TwinFlowConfig") -> ArgumentError:
    return ArgumentError(where, name, wanted, repr(value))


def _type_error(name: str, wanted: str, value: object) -> ArgumentTypeError:
    return ArgumentTypeError("TwinFlowConfig", name, wanted, repr(value))


def _require_choice(name: str, value: object, allowed: tuple[str, ...], where: str = "TwinFlowConfig") -> None:
    if value not in allowed:
        raise _error(name, f"one of {', '.join(allowed)}", value, where)


def _checked_shares(shares: Mapping[str, float], adversarial: bool) -> dict[str, float]:
    if not isinstance(shares, Mapping):
        raise ArgumentTypeError("TwinFlowConfig", "shares", "a mapping of role to share", type(shares).__name__)
    for role, share in shares.items():
        _require_choice("shares", role, ROLES)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < math.inf:
            raise _error(f"shares[{role!r}]", "a number >= 0", share)
    checked = {role: float(shares.get(role, 0.0)) for role in ROLES}
    if not adversarial:
        checked["adv"] = 0.0
    if sum(checked.values()) <= 0:
        raise _error("shares", "positive for at least one role that runs", dict(shares))
    return checked


def _numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(values, (tuple, list)) or not {type(value) for value in values} <= {int, float}:
        raise _type_error(name, "a tuple of numbers", values)
    return tuple(values)


def _number(config: TwinFlowConfig, name: str, low: float, high: float, wanted: str, open_low: bool = False) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _type_error(name, wanted, value)
    if not low <= value <= high or (open_low and value == low):  # False for NaN
        raise _error(name, wanted, value)


def _check(config: TwinFlowConfig) -> None:
    big = 1e30
    for name in ("estimate_order", "target_step_count"):
        value, least = getattr(config, name), 0 if name == "estimate_order" else 1
        if isinstance(value, bool) or not isinstance(value, int):
            raise _type_error(name, f"an integer >= {least}", value)
        if value < least:
            raise _error(name, f"an integer >= {least}", value)
    weights = ("real_velocity_weight", "adversarial_weight", "rectify_weight", "consistency_weight")
    for name in ("enhanced_ratio", *weights):
        _number(config, name, 0.0, big, "a finite number >= 0")
    for name in ("delta_t", "step_focus"):
        _number(config, name, 0.0, 1.0, "in (0, 1]" if name == "delta_t" else "in [0, 1]", open_low=name == "delta_t")
    if config.target_clamp is not None:
        _number(config, "target_clamp", 0.0, math.inf, "a number > 0 or None", open_low=True)
    _number(config, "barron_alpha", -big, big, "a finite number")
    _number(config, "barron_c", 0.0, big, "a finite number > 0", open_low=True)
    for name in ("loss", "rectify_loss"):
        _require_choice(name, getattr(config, name), LOSSES)
    _require_choice("rng_align", config.rng_align, ("batch", "rows"))
    for name in ("adversarial", "time_weight", "data_free", "check_finite"):
        if not isinstance(getattr(config, name), bool):
            raise _type_error(name, "True or False", getattr(config, name))
    low_high, dist = config.enhanced_range, config.time_dist
    if len(low_high) != 2 or not 0 <= low_high[0] < low_high[1]:
        raise _error("enhanced_range", "(lo, hi) with 0 <= lo < hi", low_high)
    if len(dist) != 3 or not (dist[0] > 0 and dist[1] > 0 and 0 < dist[2] <= 1):
        raise _error("time_dist", "(a, b, scale) with a, b > 0 and 0 < scale <= 1", dist)
