"""`resolve()`: what options mean together."""

from collections.abc import Callable, Mapping
from typing import Any

from twinflow.bridge import require_bridge
from twinflow.conditioning import LORA_MODE
from twinflow.models.registry import REGISTRATIONS
from twinflow.objective.config import TwinFlowConfig
from twinflow.suggest import lookup
from twinflow.train.config.objective import objective
from twinflow.train.config.options import OPTIONS
from twinflow.train.config.presets import train_preset

NO_EMA = (
    "TwinFlow requires an EMA teacher; enable use_ema or set twinflow_allow_no_ema_teacher to fall back to student "
    "weights explicitly."
)
NO_BRIDGE = "train: diff2flow_enabled must be true for a model that predicts no velocity, got False"
FLAT = (
    "one step without twinflow_adversarial_enabled tends to look flat: enable it, or sample in 2 to 4 steps "
    "(twinflow_target_step_count)"
)
# options that are None until others are known -> their default then; `twinflow` is the objective or None
DERIVED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "lora_alpha": lambda s: float(s["lora_rank"]),
    "conditioning": lambda s: None if s["twinflow"] is None else LORA_MODE,
    "cache_dir": lambda s: s["output_dir"] / "cache",
    "lr_scheduler": lambda s: "constant_with_warmup" if s["lr_warmup_steps"] else "constant",
    "tracker_run_name": lambda s: s["output_dir"].name or "run",
    "validation_guidance": lambda s: 4.0 if s["twinflow"] is None else 0.0,
    "validation_num_inference_steps": lambda s: 30 if s["twinflow"] is None else s["twinflow"].target_step_count,
    "validation_seed": lambda s: s["seed"],
    "validation_resolution": lambda s: (s["resolution"], s["resolution"]),
}
_NOT_ITS_OWN = ("twinflow", "twinflow_", "diff2flow_")  # options that `objective` reads


def resolve(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run.

    Args:
        given: option -> value as read; None and "" mean the default.

    Returns:
        The fields of `TrainSettings`.

    Raises:
        ValueError: a value of the wrong kind, or options that do not go together.
    """
    given = {name: value for name, value in given.items() if value is not None and value != ""}
    recipe = None
    if "preset" in given:
        recipe = train_preset(OPTIONS["preset"].kind.convert("preset", given["preset"]))
        own_alpha = {"lora_alpha"} if "lora_rank" in given else set()  # it goes with the rank of the recipe
        given = {name: value for name, value in recipe.options().items() if name not in own_alpha} | given
    found = {name: option.default for name, option in OPTIONS.items()}
    found |= {name: OPTIONS[name].kind.convert(name, value) for name, value in given.items()}
    _require("pretrained_model_name_or_path", found, "a diffusers pipeline")
    data_free = _data_free(found)
    kinds = {name: found[name] for name in given}
    config, options = objective(kinds, recipe, data_free)
    warnings: list[str] = []
    _model(found, config, options)
    _steps(found, warnings)
    _validation(found, config, warnings)
    own = {name: value for name, value in found.items() if not name.startswith(_NOT_ITS_OWN)}
    own |= {"twinflow": config, "twinflow_options": options, "warnings": tuple(warnings)}
    return own | {name: default(own) for name, default in DERIVED.items() if own[name] is None}


def _require(name: str, found: Mapping[str, Any], wanted: str) -> None:
    if found[name] is None:
        raise ValueError(f"train: {name} must be given ({wanted}), got nothing")


def _data_free(found: Mapping[str, Any]) -> bool:
    if found["prompts_file"] is not None and found["instance_data_dir"] is not None:
        raise ValueError(
            f"train: prompts_file must be absent beside instance_data_dir, got both, {str(found['prompts_file'])!r} "
            f"and {str(found['instance_data_dir'])!r}"
        )
    return found["prompts_file"] is not None


def _model(found: dict[str, Any], config: TwinFlowConfig | None, options: Mapping[str, Any]) -> None:
    """The bridge, the teacher, the conditioning and what is trained."""
    _bridge(found, config, options)
    if config is not None:
        itself = options["twinflow_allow_no_ema_teacher"] or not options["twinflow_require_ema"]
        if not (found["use_ema"] or itself):
            raise ValueError(NO_EMA)
        if config.data_free and found["instance_data_dir"] is not None:
            raise ValueError("train: twinflow.data_free must be false with instance_data_dir, got True")
    elif found["conditioning"] is not None:
        actual = found["conditioning"]
        raise ValueError(f"train: conditioning must be absent where twinflow_enabled is false, got {actual!r}")
    if found["model_type"] == "full" and found["base_lora"] is not None:
        raise ValueError(f"train: base_lora must be absent where model_type is full, got {str(found['base_lora'])!r}")


def _bridge(found: Mapping[str, Any], config: TwinFlowConfig | None, options: Mapping[str, Any]) -> None:
    family, prediction = found["model_family"], found["prediction_type"]
    diffusion = family is not None and REGISTRATIONS[family].diffusion
    if prediction in ("epsilon", "v_prediction") and family is not None and not diffusion:
        raise ValueError(f"train: prediction_type must be flow_matching for a {family} model, got {prediction!r}")
    if diffusion and prediction == "flow_matching":
        raise ValueError("train: prediction_type must be epsilon or v_prediction for a unet model, got 'flow_matching'")
    if not diffusion and prediction in (None, "flow_matching"):
        return
    if config is not None:
        require_bridge(prediction or "epsilon", options)
    elif not options["diff2flow_enabled"]:
        raise ValueError(NO_BRIDGE)


def _steps(found: dict[str, Any], warnings: list[str]) -> None:
    """The learning rate's course, and memory."""
    warm_up = found["lr_warmup_steps"]
    if found["lr_scheduler"] == "constant" and warm_up:
        hint = "use constant_with_warmup"
        raise ValueError(f"train: lr_warmup_steps must be 0 with lr_scheduler constant, got {warm_up}: {hint}")
    name = found["memory_preset"]
    if found["gradient_checkpointing"] and name == "auto":
        name = found["memory_preset"] = "checkpoint"
    elif found["gradient_checkpointing"] and name != "checkpoint":
        warnings.append(f"memory_preset {name} decides what is recomputed, not gradient_checkpointing")
    if name == "auto":
        return
    from twinflow.memory.presets import PRESETS  # diffusers comes with it, which other commands need not wait for

    preset = lookup(PRESETS, name[:60], "train: memory_preset", also="auto or ")
    if found["model_type"] == "full" and (preset.base or preset.defer):
        moved = " and ".join(preset.changes()[:2])
        wanted = "one that leaves the weights as they are where model_type is full"
        raise ValueError(f"train: memory_preset must be {wanted}, got {name!r}: {moved}")


def _validation(found: dict[str, Any], config: TwinFlowConfig | None, warnings: list[str]) -> None:
    """TwinFlow has its own guidance and number of steps."""
    if config is None:
        return
    guidance, steps = found["validation_guidance"], found["validation_num_inference_steps"]
    target = config.target_step_count
    if guidance:
        warnings.append(f"validation_guidance is 0.0 with TwinFlow, which trains guidance in, not {guidance:g}")
    if steps not in (None, target):
        warnings.append(f"validation_num_inference_steps is twinflow_target_step_count, {target}, not {steps}")
    if not 1 <= target <= 4:
        warnings.append(f"twinflow_target_step_count is {target}; TwinFlow is for 1 to 4 steps")
    if target == 1 and not config.adversarial:
        warnings.append(FLAT)
    found["validation_guidance"], found["validation_num_inference_steps"] = 0.0, target
