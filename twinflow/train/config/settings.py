"""`TrainSettings`: the options of `twinflow train`, each written once, and their values in a run."""

# ruff: noqa: RUF009 - a field is made by a call

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from twinflow.errors import ArgumentError, require
from twinflow.models.registry import REGISTRATIONS
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.flags import FLAGS
from twinflow.train.config.objective import FLOW_MATCHING
from twinflow.train.config.option_types import (
    BOOL,
    DATA_PATH,
    NAME_OR_PATH,
    PATH,
    PATHS,
    PIXELS,
    RAW,
    SIZE,
    TEXT,
    TEXTS,
    Kind,
    absolute,
    choice,
    number,
    whole,
)
from twinflow.train.config.presets import TRAIN_PRESETS
from twinflow.train.config.simpletuner import REFUSED_FAMILIES

MODES = ("dual", "midpoint", "sign", "dual+sign", "midpoint+sign")  # of twinflow.conditioning, without importing torch


def _family(value: Any) -> str:
    """A family that can be trained, by its name or an alias."""
    if not isinstance(value, str):
        raise TypeError
    entries = {alias: name for name, entry in REGISTRATIONS.items() if entry.trains for alias in (name, *entry.aliases)}
    return entries[value]


_TRAINED = ", ".join(name for name, entry in REGISTRATIONS.items() if entry.trains)
_FAMILY = Kind(f"one of {_TRAINED}", _family, REFUSED_FAMILIES, "NAME")
_BF16 = "use adamw, whose states are float32 (what a step adds to bfloat16 weights rounds to zero), or adamw8bit"
_OPTIMIZER = choice("adamw", "adamw8bit", "radam", instead={
    "adamw_bf16": _BF16, "adamw-bf16": _BF16, "ao-adamw8bit": "use adamw8bit", "bnb-adamw8bit": "use adamw8bit",
    "optimi-adamw": "use adamw", "optimi-adam": "use adamw with adam_weight_decay 0", "optimi-radam": "use radam",
    "sgd": "use adamw",
})  # fmt: skip
_CONSTANT = "the method trains at a constant rate: use constant or constant_with_warmup"
_DECAYS = ("linear", "sine", "cosine", "cosine_with_restarts", "polynomial")
_SCHEDULE = choice("constant", "constant_with_warmup", instead=dict.fromkeys(_DECAYS, _CONSTANT))
_PRECISION = choice("no", "bf16", fp32="no", instead={
    "fp16": "residuals are 1 / delta_t = 100 times what the network puts out and leave its range; use bf16 or no",
    "fp8": "use bf16, with memory_preset 32gb or 24gb for a packed base",
})  # fmt: skip
_PREDICT = choice("flow_matching", "epsilon", "v_prediction", instead={"sample": "no bridge reads it"})
_REPORT = choice("none", "tensorboard", "wandb", "all", instead={"comet_ml": "use tensorboard or wandb"})
_CAPTIONS = choice("auto", "textfile", "metadata", parquet="metadata", instead=dict.fromkeys(
    ("filename", "instance_prompt"), "put the captions into .txt files or a metadata.jsonl"))  # fmt: skip
_TYPE, _MODES, _WHERE = choice("lora", "full"), choice(*MODES), choice("accelerator", "cpu")
_COUNT, _MANY, _SEED, _ALIGN = whole(1), whole(0), whole(0, 2**32 - 1), whole(8, 512)
_AT0, _ABOVE0, _RATE, _SCALE = number(0), number(0, open_low=True), number(0, 1e3, open_low=True), number(0, 1000)
_EPS, _BETA = number(0, 1, open_low=True), number(0, 1, open_high=True)
_EMA = number(0, 1, open_low=True, open_high=True)
_METAVARS = {bool: BOOL.metavar, int: whole(0).metavar, float: number(0).metavar, str: "NAME"}
_KIND_OF_TYPE: dict[Any, Kind] = {
    bool: BOOL, str: TEXT, str | None: TEXT, Path: PATH, Path | None: PATH, tuple[str, ...]: TEXTS,
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name and its value.

    Args:
        group: heading that it stands under.
        default: its value where it is not given; None: `derived`, or none.
        help: one line.
        fixed: whether another value would make a resumed run another run.
        derived: other settings -> default.
    """

    group: str
    default: Any
    help: str
    kind: Kind
    fixed: bool = False
    derived: Callable[[Mapping[str, Any]], Any] | None = None


def _option(group: str, default: Any, help: str, kind: Kind = RAW, **more: Any) -> Any:
    """A field; without a kind of its own it takes the values of its type."""
    return field(metadata={"option": Option(group, default, help, kind, **more)})


_model, _data, _step, _optimizer, _run, _validation = (
    partial(_option, group) for group in ("model", "data", "step", "optimizer", "run", "validation")
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of a run: a field an option, with its group, default, meaning and kind.

    Args:
        twinflow: the objective; None: plain flow matching.
        twinflow_options: option -> value of what `TwinFlowConfig.from_flags` leaves to the trainer.
        warnings: sentences about options that have no effect, or not the one that was asked for.
    """

    # fmt: off
    preset: str | None = _model(None, f"published recipe that other options override: {', '.join(TRAIN_PRESETS)}")
    pretrained_model_name_or_path: str = _model(None, "diffusers pipeline: hub name or folder", NAME_OR_PATH,
                                                fixed=True)
    model_family: str | None = _model(None, f"{_TRAINED} (default: read from the pipeline)", _FAMILY,
                                      fixed=True)
    model_type: str = _model("lora", "lora, or full to train all weights", _TYPE, fixed=True)
    prediction_type: str | None = _model(None, "flow_matching, epsilon or v_prediction", _PREDICT, fixed=True)
    lora_rank: int = _model(64, "rank of the LoRA", _COUNT, fixed=True)
    lora_alpha: float = _model(None, "scale of the LoRA (default: its rank)", _ABOVE0, fixed=True,
                               derived=lambda s: float(s["lora_rank"]))
    lora_layers: tuple[str, ...] = _model((), "layers that get the LoRA (default: the family's)", fixed=True)
    base_lora: Path | None = _model(None, "another LoRA, frozen underneath", fixed=True)
    conditioning: str | None = _model(None, f"how the model takes both times: {', '.join(MODES)} (default: dual)",
                                      _MODES, fixed=True, derived=lambda s: None if s["twinflow"] is None else MODES[0])

    instance_data_dir: Path | None = _data(None, "folder of images with captions", DATA_PATH, fixed=True)
    data_backend_config: Path | None = _data(None, "SimpleTuner's file of one local folder of images", fixed=True)
    prompts_file: Path | None = _data(None, "prompts, one a line: training without images", DATA_PATH, fixed=True)
    metadata_file: Path | None = _data(None, "captions: .jsonl, .csv or .parquet (default: searched)", DATA_PATH,
                                       fixed=True)
    caption_strategy: str = _data("auto", "auto, textfile (.txt beside the image) or metadata", _CAPTIONS, fixed=True)
    caption_column: str = _data("text", "column of the captions in the metadata", fixed=True)
    image_column: str = _data("file_name", "column of the file names in the metadata", fixed=True)
    unconditional_prompt: str = _data("", "prompt that guidance leads away from", fixed=True)
    resolution: int = _data(1024, "pixels: edge of a square of an image's area", PIXELS, fixed=True)
    aspect_buckets: bool = _data(True, "keep aspect ratios; false: crop squares", fixed=True)
    aspect_bucket_alignment: int = _data(64, "pixels: edges are multiples of it", _ALIGN, fixed=True)
    eval_share: float = _data(0.05, "share of images held out for the validation loss", _BETA, fixed=True)
    skip_bad: bool = _data(False, "leave out images that cannot be read")
    cache_dir: Path = _data(None, "folder of encodings (default: cache in output_dir)",
                            derived=lambda s: s["output_dir"] / "cache")
    vae_batch_size: int = _data(4, "images encoded at once", _COUNT)
    text_batch_size: int = _data(16, "prompts encoded at once", _COUNT)

    train_batch_size: int = _step(1, "images of a micro-batch, per process", _COUNT, fixed=True)
    gradient_accumulation_steps: int = _step(1, "micro-batches of a step", _COUNT, fixed=True)
    max_train_steps: int = _step(2000, "steps of the optimizer", _COUNT)
    seed: int = _step(42, "seed of every random number", _SEED, fixed=True)
    mixed_precision: str = _step("bf16", "bf16 or no", _PRECISION, fixed=True)
    memory_preset: str = _step("auto", "a row of `twinflow plan`; auto: the fastest that fits")
    gradient_checkpointing: bool = _step(False, "the same as memory_preset checkpoint")
    compile_blocks: bool = _step(False, "torch.compile each repeated block")

    optimizer: str = _optimizer("adamw", "adamw, adamw8bit or radam", _OPTIMIZER, fixed=True)
    learning_rate: float = _optimizer(1e-4, "learning rate", _RATE)
    lr_scheduler: str = _optimizer(None, "constant or constant_with_warmup (default: by lr_warmup_steps)", _SCHEDULE,
        derived=lambda s: "constant_with_warmup" if s["lr_warmup_steps"] else "constant")
    lr_warmup_steps: int = _optimizer(0, "steps over which the rate rises from 0", _MANY)
    adam_beta1: float = _optimizer(0.9, "decay of the gradients' average", _BETA)
    adam_beta2: float = _optimizer(0.999, "decay of the squared gradients' average", _BETA)
    adam_epsilon: float = _optimizer(1e-8, "added to the root of that average", _EPS)
    adam_weight_decay: float = _optimizer(0.0, "decoupled weight decay", _AT0)
    max_grad_norm: float = _optimizer(1.0, "gradients are scaled down to this norm; 0: never", _AT0)
    use_ema: bool = _optimizer(False, "keep an average of the weights: the teacher", fixed=True)
    ema_decay: float = _optimizer(0.99, "decay of that average per step", _EMA, fixed=True)
    ema_device: str = _optimizer("accelerator", "where it is kept: accelerator or cpu", _WHERE)

    output_dir: Path = _run(Path("output"), "folder of the run")
    resume_from_checkpoint: str = _run("latest", "latest, no, or a checkpoint: its name or its folder", NAME_OR_PATH)
    checkpointing_steps: int = _run(500, "steps between checkpoints; 0: at the end only", _MANY)
    checkpoints_total_limit: int = _run(3, "checkpoints to keep; 0: all", _MANY)
    report_to: str = _run("none", "none, tensorboard, wandb or all", _REPORT)
    logging_steps: int = _run(10, "steps between logged values", _COUNT)
    tracker_project_name: str = _run("twinflow", "project in wandb")
    tracker_run_name: str = _run(None, "name of the run (default: output_dir)",
                                 derived=lambda s: s["output_dir"].name or "run")
    debug: bool = _run(False, "show the traceback of an error")

    validation_prompts: tuple[str, ...] = _validation((), "prompts of the samples")
    validation_negative_prompt: str = _validation("", "negative prompt where validation_guidance > 1")
    validation_steps: int = _validation(500, "steps between samples; 0: none", _MANY)
    validation_guidance: float = _validation(None, "guidance of the samples (TwinFlow: 0; otherwise 4)", _SCALE,
        derived=lambda s: 4.0 if s["twinflow"] is None else 0.0)
    validation_num_inference_steps: int = _validation(None, "sampling steps (TwinFlow: its step count; otherwise 30)",
        _COUNT, derived=lambda s: 30 if s["twinflow"] is None else s["twinflow"].target_step_count)
    validation_seed: int = _validation(None, "seed of the samples (default: seed)", _SEED, derived=lambda s: s["seed"])
    validation_resolution: tuple[int, int] = _validation(None, "pixels: edge or WIDTHxHEIGHT (default: resolution)",
        SIZE, derived=lambda s: (s["resolution"], s["resolution"]))
    eval_steps: int = _validation(500, "steps between validation losses; 0: none", _MANY)
    disable_benchmark: bool = _validation(False, "leave out the samples of the untrained model")

    twinflow: TwinFlowConfig | None = _option("TwinFlow", None, "settings of TwinFlowConfig, an object of JSON")
    # fmt: on
    twinflow_options: Mapping[str, Any] = field(hash=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step on one process."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def objective(self) -> TwinFlowConfig:
        """The objective: TwinFlow's, or plain flow matching as one."""
        return FLOW_MATCHING if self.twinflow is None else self.twinflow

    @property
    def data_free(self) -> bool:
        """Whether there are prompts instead of images."""
        return self.prompts_file is not None

    def require_data(self) -> None:
        """Raises ArgumentError where there is nothing to train on; a dry run does without."""
        lost = self.data_backend_config is None
        require(lost, "train", "data_backend_config", "a JSON file that exists", repr(str(self.data_backend_config)))
        if self.instance_data_dir is None and self.prompts_file is None:
            raise ArgumentError("train", "instance_data_dir", "given, a folder of images (or prompts_file)", "neither")
        if self.twinflow is not None and self.twinflow.data_free and self.prompts_file is None:
            raise ArgumentError("train", "prompts_file", "given where twinflow.data_free is true", "nothing")

    def with_absolute_paths(self) -> "TrainSettings":
        """The same settings, what they read (model, LoRA, data) named from the root on; hub names stay."""
        paths = [name for name, option in OPTIONS.items() if option.fixed and option.kind in PATHS]
        return replace(self, **{name: absolute(getattr(self, name)) for name in paths})

    def to_json(self) -> str:
        """The settings as a config file, which `read_config` reads as the same settings."""
        values = {name: getattr(self, name) for name in OPTIONS if name not in FLAGS}
        objective = None if self.twinflow is None else self.twinflow.to_dict()
        return json.dumps({**values, **self.twinflow_options, "twinflow": objective}, indent=1, default=str) + "\n"


def _options() -> dict[str, Option]:
    options: dict[str, Option] = {}
    for row in fields(TrainSettings):
        if row.name == "twinflow":
            for name, flag in FLAGS.items():
                kind = replace(RAW, metavar=_METAVARS[flag.type])
                options[name] = Option("TwinFlow", flag.default, flag.help, kind)
        if option := row.metadata.get("option"):
            of_type = _KIND_OF_TYPE.get(row.type, RAW)
            options[row.name] = replace(option, kind=of_type) if option.kind is RAW else option
    return options


OPTIONS = _options()
