"""`read_config()`: from the options of a config file and a command line to the settings of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinflow.errors import ArgumentError
from twinflow.models.registry import REGISTRATIONS
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.flags import FLAGS
from twinflow.suggest import did_you_mean, lookup, nearest
from twinflow.train.config import simpletuner
from twinflow.train.config.data_backend import read_backend
from twinflow.train.config.objective import objective
from twinflow.train.config.option_types import shown
from twinflow.train.config.presets import train_preset
from twinflow.train.config.settings import OPTIONS, TrainSettings

NO_EMA = (
    "TwinFlow requires an EMA teacher; enable use_ema or set twinflow_allow_no_ema_teacher to fall back to student "
    "weights explicitly."
)
FLAT = (
    "one step without twinflow_adversarial_enabled tends to look flat: enable it, or sample in 2 to 4 steps "
    "(twinflow_target_step_count)"
)
_MOST_BYTES = 1_000_000  # of a config file
# another spelling, of diffusers' scripts or of SimpleTuner -> option
ALIASES = {
    "rank": "lora_rank", "lora_targets": "lora_layers", "data_dir": "instance_data_dir",
    "train_data_dir": "instance_data_dir", "parquet_caption_column": "caption_column",
    "parquet_filename_column": "image_column", "memory": "memory_preset", "lr": "learning_rate",
    "optimizer_beta1": "adam_beta1", "optimizer_beta2": "adam_beta2", "weight_decay": "adam_weight_decay",
    "checkpoint_step_interval": "checkpointing_steps", "validation_prompt": "validation_prompts",
    "validation_step_interval": "validation_steps", "eval_steps_interval": "eval_steps",
}  # fmt: skip


def read_config(path: Path | None, overrides: Mapping[str, Any]) -> TrainSettings:
    """The settings of a config file and of options that override it.

    Args:
        path: a JSON file; None: there is none.
        overrides: option -> value, as a file has them or as text; None and "" mean the default, whatever the file says.

    Returns:
        The settings. No file but the config, and the files of data and prompts that one of SimpleTuner names, was
        looked at.

    Raises:
        ValueError: one line that says what is wrong, of all options that are not supported.
    """
    from_file = {} if path is None else known_options(read_json(Path(path)))
    given = known_options(overrides)
    backend = (from_file | given).get("data_backend_config")
    warnings: list[str] = []
    if backend:
        place = OPTIONS["data_backend_config"].kind.convert("data_backend_config", backend)
        found, warnings = read_backend(place)
        given = found | given
        if found:
            from_file, given = (
                {n: v for n, v in of.items() if n != "data_backend_config"} for of in (from_file, given)
            )
    values = _resolve(from_file | given)
    return TrainSettings(**values | {"warnings": (*warnings, *values["warnings"])})


def option_name(spelling: str) -> str:
    """The name of an option, known or not: without dashes, aliases resolved."""
    name = spelling.removeprefix("--").replace("-", "_")
    return ALIASES.get(name, name)


def known_options(options: Mapping[Any, Any]) -> dict[str, Any]:
    """Options by name, without those of SimpleTuner that mean nothing here.

    Args:
        options: spelling -> value; spellings may begin with two dashes and have dashes inside.

    Raises:
        ValueError: an unknown option, one that is given twice, or those that are not supported, all of them.
    """
    values: dict[str, Any] = {}
    spellings: dict[str, str] = {}
    refused: list[ValueError] = []
    for spelling, value in options.items():
        name = option_name(str(spelling))
        if name in spellings:
            raise ArgumentError("train", name, "given once", f"{spellings[name]} and {spelling}")
        spellings[name] = str(spelling)
        if name in OPTIONS:
            values[name] = value
        elif name == "user_prompt_library":
            values["validation_prompts"] = simpletuner.prompt_library(value)
        elif simpletuner.knows(name):
            refused += simpletuner.refusal(name, value)
        else:
            refused.append(unknown_option(str(spelling)))
    if len(refused) > 1:
        said = [error.without_function if isinstance(error, ArgumentError) else str(error) for error in refused]
        raise ValueError(f"train: {len(refused)} options cannot be taken: {' | '.join(said)}")
    for error in refused:
        raise error
    return values


def unknown_option(spelling: str) -> ValueError:
    """The error of an unknown option, with the nearest known name."""
    near = nearest(option_name(spelling), [*OPTIONS, *ALIASES], "twinflow_")
    hint = did_you_mean([*map(repr, near)])
    return ValueError(f"unknown option {shown(spelling)}; {hint or '`twinflow train --help` lists them all'}")


def no_bridge() -> ArgumentError:
    """The error of a diffusion model that is to be trained without TwinFlow and without a bridge."""
    return ArgumentError("train", "diff2flow_enabled", "true for a model that predicts no velocity", False)


def _resolve(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `TrainSettings` for options that are given by name; None and "" mean the default."""
    options = {name: value for name, value in options.items() if value is not None and value != ""}
    preset = None
    if "preset" in options:
        preset = train_preset(OPTIONS["preset"].kind.convert("preset", options["preset"]))
        left_out = {"lora_alpha"} if "lora_rank" in options else set()  # it goes with the rank of the preset
        options = {name: value for name, value in preset.options().items() if name not in left_out} | options
    options = {name: OPTIONS[name].kind.convert(name, value) for name, value in options.items()}
    values = {name: option.default for name, option in OPTIONS.items()} | options
    if values["pretrained_model_name_or_path"] is None:
        raise ArgumentError("train", "pretrained_model_name_or_path", "given (a diffusers pipeline)", "nothing")
    if values["prompts_file"] is not None and values["instance_data_dir"] is not None:
        both = f"both, {str(values['prompts_file'])!r} and {str(values['instance_data_dir'])!r}"
        raise ArgumentError("train", "prompts_file", "absent beside instance_data_dir", both)
    config, flags = objective(options, preset, data_free=values["prompts_file"] is not None)
    _check_model(values, config, flags)
    warnings = [*_resolve_memory(values), *_resolve_validation(values, config)]
    values = {name: value for name, value in values.items() if name not in FLAGS}
    values |= {"twinflow": config, "twinflow_options": flags, "warnings": tuple(warnings)}
    for name, option in OPTIONS.items():
        if option.derived is not None and values[name] is None:
            values[name] = option.derived(values)
    return values


def _check_model(values: Mapping[str, Any], config: TwinFlowConfig | None, flags: Mapping[str, Any]) -> None:
    """The bridge, the teacher, the conditioning and what is trained."""
    _check_bridge(values, config, flags)
    if config is not None:
        itself = flags["twinflow_allow_no_ema_teacher"] or not flags["twinflow_require_ema"]
        if not (values["use_ema"] or itself):
            raise ValueError(NO_EMA)
        if config.data_free and values["instance_data_dir"] is not None:
            raise ArgumentError("train", "twinflow.data_free", "false with instance_data_dir", True)
    elif values["conditioning"] is not None:
        wanted = "absent where twinflow_enabled is false"
        raise ArgumentError("train", "conditioning", wanted, repr(values["conditioning"]))
    if values["model_type"] == "full" and values["base_lora"] is not None:
        base = repr(str(values["base_lora"]))
        raise ArgumentError("train", "base_lora", "absent where model_type is full", base)
    if values["lr_scheduler"] == "constant" and values["lr_warmup_steps"]:
        wanted, hint = "0 with lr_scheduler constant", "use constant_with_warmup"
        raise ArgumentError("train", "lr_warmup_steps", wanted, values["lr_warmup_steps"], hint)


def _check_bridge(values: Mapping[str, Any], config: TwinFlowConfig | None, flags: Mapping[str, Any]) -> None:
    family, prediction = values["model_family"], values["prediction_type"]
    diffusion = family is not None and REGISTRATIONS[family].diffusion
    if prediction in ("epsilon", "v_prediction") and family is not None and not diffusion:
        wanted = f"flow_matching for a {family} model"
        raise ArgumentError("train", "prediction_type", wanted, repr(prediction))
    if diffusion and prediction == "flow_matching":
        wanted = f"epsilon or v_prediction for a {family} model"
        raise ArgumentError("train", "prediction_type", wanted, repr(prediction))
    if not diffusion and prediction in (None, "flow_matching"):
        return
    if config is not None:
        from twinflow.bridge import require_bridge  # torch comes with it, which `--help` need not wait for

        require_bridge(prediction or "epsilon", flags)
    elif not flags["diff2flow_enabled"]:
        raise no_bridge()


def _resolve_memory(values: dict[str, Any]) -> list[str]:
    """Turns gradient_checkpointing into a memory preset and checks it; returns warnings."""
    name, warnings = values["memory_preset"], []
    if values["gradient_checkpointing"] and name == "auto":
        name = values["memory_preset"] = "checkpoint"
    elif values["gradient_checkpointing"] and name != "checkpoint":
        warnings.append(f"memory_preset {name} decides what is recomputed, not gradient_checkpointing")
    if name != "auto":
        from twinflow.memory.presets import PRESETS  # torch comes with it

        preset = lookup(PRESETS, name[:60], "train", "memory_preset", also="auto or ")
        if values["model_type"] == "full" and (preset.base or preset.defer):
            wanted = "one that leaves the weights as they are where model_type is full"
            changes = " and ".join(preset.changes()[:2])
            raise ArgumentError("train", "memory_preset", wanted, repr(name), changes)
    return warnings


def _resolve_validation(values: dict[str, Any], config: TwinFlowConfig | None) -> list[str]:
    """Sets the guidance and the number of steps that TwinFlow samples with; returns warnings."""
    if config is None:
        return []
    warnings = []
    guidance, steps = values["validation_guidance"], values["validation_num_inference_steps"]
    target = config.target_step_count
    if guidance:
        warnings.append(f"validation_guidance is 0.0 with TwinFlow, which trains guidance in, not {guidance:g}")
    if steps not in (None, target):
        warnings.append(f"validation_num_inference_steps is twinflow_target_step_count, {target}, not {steps}")
    if not 1 <= target <= 4:
        warnings.append(f"twinflow_target_step_count is {target}; TwinFlow is for 1 to 4 steps")
    if target == 1 and not config.adversarial:
        warnings.append(FLAT)
    values["validation_guidance"], values["validation_num_inference_steps"] = 0.0, target
    return warnings


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of UTF-8 text, with a byte-order mark or without.

    Raises:
        ArgumentError: no such file, none that can be read, no JSON, no object, or a key that is there twice.
    """
    try:
        value = json.loads(_text(path), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except json.JSONDecodeError as error:
        where = f"{path} line {error.lineno} column {error.colno}"
        raise _error("JSON", f"{where}: {error.msg}{_explanation(error)}") from None
    except RecursionError:
        raise _error("JSON", f"{path}, nested too deeply") from None
    except ArgumentError:
        raise
    except ValueError:
        raise _error("JSON", f"{path} with an integer too long to read") from None
    if not isinstance(value, dict):
        raise ArgumentError("train", "config", "an object {...}", f"{path} with a {type(value).__name__}", verb="hold")
    return value


def _error(wanted: str, got: str) -> ArgumentError:
    return ArgumentError("train", "config", wanted, got)


def _text(path: Path) -> str:
    wanted = "a JSON file"
    try:
        if path.is_dir():
            raise _error(wanted, f"the folder {path}")
        if not path.is_file():
            raise _error(f"{wanted} that exists", repr(str(path)))
        if path.stat().st_size > _MOST_BYTES:
            raise _error(f"{wanted} of at most {_MOST_BYTES} bytes", f"{path} with {path.stat().st_size}")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _error(f"{wanted} that can be read", f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _error(f"{wanted} in UTF-8", f"{path} with byte {error.start} of another encoding") from None


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in mapping if keys.count(key) > 1)
        raise ArgumentError("train", repr(twice), "given once", f"it twice in {path}")
    return mapping


def _explanation(error: json.JSONDecodeError) -> str:
    """What JSON lacks and other formats have, where that is what stands there."""
    here, before = error.doc[error.pos :].lstrip(), error.doc[: error.pos].rstrip()
    if not error.doc.strip():
        return " (the file is empty)"
    if here[:2] in ("//", "/*") or here[:1] == "#":
        return " (JSON has no comments)"
    if (here[:1] in ("}", "]") and before.endswith(",")) or (here[:1] == "," and here[1:].lstrip()[:1] in ("}", "]")):
        return " (JSON has no comma after the last entry)"
    return " (JSON has double quotes only)" if here[:1] == "'" else ""
