"""`OPTIONS`: every option of `twinflow train`, of its config file and of its command line alike."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twinflow.conditioning import MODES
from twinflow.train.config.families import FAMILY
from twinflow.train.config.option_types import (
    BOOL,
    PATH,
    PIXELS,
    RAW,
    SIZE,
    TEXT,
    TEXTS,
    Kind,
    choice,
    number,
    shown,
    whole,
)
from twinflow.train.config.simpletuner import HARMLESS, UNSUPPORTED, refuse

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
_SHARE, _EPS, _BETA = number(0, 1), number(0, 1, open_low=True), number(0, 1, open_high=True)
_EMA = number(0, 1, open_low=True, open_high=True)

# group -> rows of: name, default (None: resolved from others, or nothing), kind, help
_TABLE: dict[str, tuple[tuple[Any, ...], ...]] = {
 "model": (
  ("preset",                         None,          TEXT,       "a published recipe; all else overrides it"),
  ("pretrained_model_name_or_path",  None,          TEXT,       "a diffusers pipeline: hub name or folder"),
  ("model_family",                   None,          FAMILY,     "sd3, flux, qwen_image, z_image, sana, sdxl, ..."),
  ("model_type",                     "lora",        _TYPE,      "lora, or full for all weights"),
  ("prediction_type",                None,          _PREDICT,   "flow_matching, epsilon or v_prediction"),
  ("lora_rank",                      64,            _COUNT,     "rank of the LoRA"),
  ("lora_alpha",                     None,          _ABOVE0,    "scale of the LoRA (default: its rank)"),
  ("lora_layers",                    (),            TEXTS,      "layers it adapts (default: the family's)"),
  ("base_lora",                      None,          PATH,       "a LoRA of your own, frozen underneath"),
  ("conditioning",                   None,          _MODES,     "how the model is told both times (default: dual)"),
 ),
 "data": (
  ("instance_data_dir",              None,          PATH,       "folder of images with captions"),
  ("prompts_file",                   None,          PATH,       "a prompt a line: data-free training"),
  ("metadata_file",                  None,          PATH,       "captions: .jsonl, .csv, .parquet (default: found)"),
  ("caption_strategy",               "auto",        _CAPTIONS,  "auto, textfile (.txt beside the image) or metadata"),
  ("caption_column",                 "text",        TEXT,       "column of the captions in the metadata"),
  ("image_column",                   "file_name",   TEXT,       "column of the file names in the metadata"),
  ("unconditional_prompt",           "",            TEXT,       "the prompt that guidance leads away from"),
  ("resolution",                     1024,          PIXELS,     "pixels: edge of a square of an image's area"),
  ("aspect_buckets",                 True,          BOOL,       "keep aspect ratios; false: crop squares"),
  ("aspect_bucket_alignment",        64,            _ALIGN,     "pixels: edges are multiples of it"),
  ("eval_share",                     0.05,          _BETA,      "share of images held out for the validation loss"),
  ("skip_bad",                       False,         BOOL,       "leave out images that cannot be read"),
  ("cache_dir",                      None,          PATH,       "of encodings (default: cache in output_dir)"),
  ("vae_batch_size",                 4,             _COUNT,     "images encoded at once"),
  ("text_batch_size",                16,            _COUNT,     "prompts encoded at once"),
 ),
 "step": (
  ("train_batch_size",               1,             _COUNT,     "images of a micro-batch, per process"),
  ("gradient_accumulation_steps",    1,             _COUNT,     "micro-batches of a step"),
  ("max_train_steps",                2000,          _COUNT,     "steps of the optimizer"),
  ("seed",                           42,            _SEED,      "of every random number"),
  ("mixed_precision",                "bf16",        _PRECISION, "bf16 or no"),
  ("memory_preset",                  "auto",        TEXT,       "as `twinflow plan` lists; auto: fastest that fits"),
  ("gradient_checkpointing",         False,         BOOL,       "the same as memory_preset checkpoint"),
  ("compile_blocks",                 False,         BOOL,       "torch.compile each repeated block"),
 ),
 "optimizer": (
  ("optimizer",                      "adamw",       _OPTIMIZER, "adamw, adamw8bit or radam"),
  ("learning_rate",                  1e-4,          _RATE,      "learning rate"),
  ("lr_scheduler",                   None,          _SCHEDULE,  "constant or constant_with_warmup (default: either)"),
  ("lr_warmup_steps",                0,             _MANY,      "steps over which the rate rises from 0"),
  ("adam_beta1",                     0.9,           _BETA,      "decay of the gradients' average"),
  ("adam_beta2",                     0.999,         _BETA,      "decay of the squared gradients' average"),
  ("adam_epsilon",                   1e-8,          _EPS,       "added to the root of the latter"),
  ("adam_weight_decay",              0.0,           _AT0,       "decoupled weight decay"),
  ("max_grad_norm",                  1.0,           _AT0,       "gradients are scaled down to this norm; 0: never"),
  ("use_ema",                        False,         BOOL,       "keep an average of the weights: the teacher"),
  ("ema_decay",                      0.99,          _EMA,       "its decay per step"),
  ("ema_device",                     "accelerator", _WHERE,     "where it is kept: accelerator or cpu"),
 ),
 "run": (
  ("output_dir",                     "output",      PATH,       "folder of the run"),
  ("resume_from_checkpoint",         "latest",      TEXT,       "latest, no, or a checkpoint's folder"),
  ("checkpointing_steps",            500,           _MANY,      "steps between checkpoints; 0: at the end only"),
  ("checkpoints_total_limit",        3,             _MANY,      "checkpoints kept; 0: all"),
  ("report_to",                      "none",        _REPORT,    "none, tensorboard, wandb or all"),
  ("logging_steps",                  10,            _COUNT,     "steps between logged values"),
  ("tracker_project_name",           "twinflow",    TEXT,       "project in wandb"),
  ("tracker_run_name",               None,          TEXT,       "name of the run (default: output_dir)"),
  ("debug",                          False,         BOOL,       "show the traceback of an error"),
 ),
 "validation": (
  ("validation_prompts",             (),            TEXTS,      "prompts of the samples; may be repeated"),
  ("validation_negative_prompt",     "",            TEXT,       "where validation_guidance > 1"),
  ("validation_steps",               500,           _MANY,      "steps between samples; 0: none"),
  ("validation_guidance",            None,          _SCALE,     "of the samples (TwinFlow: 0; otherwise 4)"),
  ("validation_num_inference_steps", None,          _COUNT,     "sampling steps (TwinFlow: its step count; else 30)"),
  ("validation_seed",                None,          _SEED,      "of the samples (default: seed)"),
  ("validation_resolution",          None,          SIZE,       "pixels: edge or WIDTHxHEIGHT (default: resolution)"),
  ("eval_steps",                     500,           _MANY,      "steps between validation losses; 0: none"),
  ("disable_benchmark",              False,         BOOL,       "leave out the samples of the untrained model"),
 ),
 "TwinFlow": (
  ("twinflow_enabled",               False,         BOOL,       "train with TwinFlow; false: plain flow matching"),
  ("twinflow_target_step_count",     1,             RAW,        "sampling steps in validation, 1 to 4"),
  ("twinflow_estimate_order",        2,             RAW,        "teacher steps of the rollout"),
  ("twinflow_enhanced_ratio",        0.5,           RAW,        "guidance that is trained in; 0: none"),
  ("twinflow_delta_t",               0.01,          RAW,        "first step of the rollout, of a time of 1"),
  ("twinflow_target_clamp",          1.0,           RAW,        "bound of the residual"),
  ("twinflow_require_ema",           True,          RAW,        "stop where no EMA is kept as the teacher"),
  ("twinflow_allow_no_ema_teacher",  False,         RAW,        "let the student be its own teacher"),
  ("twinflow_allow_diff2flow",       False,         RAW,        "permit the bridge of diff2flow_enabled"),
  ("twinflow_adversarial_enabled",   False,         RAW,        "train on the student's own samples too"),
  ("twinflow_adversarial_weight",    1.0,           RAW,        "factor of that term"),
  ("twinflow_rectify_weight",        1.0,           RAW,        "factor of the rectify term"),
  ("twinflow_recipe",                "all_terms",   RAW,        "all_terms (the paper) or partition (its code)"),
  ("twinflow_step_focus",            0.0,           _SHARE,     "share of times on the grid of the step count"),
  ("diff2flow_enabled",              False,         RAW,        "read an epsilon or v-prediction UNet as a flow"),
  ("diff2flow_loss",                 False,         RAW,        "accepted: the loss is of the flow anyway"),
  ("twinflow",                       None,          RAW,        "in files: settings of TwinFlowConfig by name"),
 ),
}  # fmt: skip

# another spelling, of diffusers' scripts or of SimpleTuner -> option
ALIASES = {
    "rank": "lora_rank", "lora_targets": "lora_layers", "data_dir": "instance_data_dir",
    "train_data_dir": "instance_data_dir", "parquet_caption_column": "caption_column",
    "parquet_filename_column": "image_column", "memory": "memory_preset", "lr": "learning_rate",
    "optimizer_beta1": "adam_beta1", "optimizer_beta2": "adam_beta2", "weight_decay": "adam_weight_decay",
    "checkpoint_step_interval": "checkpointing_steps", "validation_prompt": "validation_prompts",
    "validation_step_interval": "validation_steps", "eval_steps_interval": "eval_steps",
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """A row of the table, and its group."""

    group: str
    name: str
    default: Any
    kind: Kind
    help: str


OPTIONS = {
    name: Option(group, name, None if default is None else kind.read(default), kind, text)
    for group, rows in _TABLE.items()
    for name, default, kind, text in rows
}


def option_name(spelling: str) -> str:
    """The name of an option, whether or not it is a known one: without dashes, aliases resolved."""
    name = spelling.removeprefix("--").replace("-", "_")
    return ALIASES.get(name, name)


def named(given: Mapping[Any, Any]) -> dict[str, Any]:
    """Options by their names.

    Args:
        given: spelling -> value; spellings may begin with two dashes and have dashes inside.

    Returns:
        name -> value; options that are known, not supported and without effect are left out.

    Raises:
        ValueError: an unknown option, one that is given twice, or one that is not supported.
    """
    found: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for spelling, value in given.items():
        name = option_name(str(spelling))
        if name in seen:
            raise ValueError(f"train: {name} must be given once, got {seen[name]} and {spelling}")
        seen[name] = str(spelling)
        if name in OPTIONS:
            found[name] = value
        elif name in UNSUPPORTED:
            refuse(name, value)
        elif name not in HARMLESS:
            raise unknown(str(spelling))
    return found


def unknown(spelling: str) -> ValueError:
    """The error of an unknown option, with the nearest known name."""
    name = option_name(spelling)
    known = [*OPTIONS, *ALIASES]
    near = difflib.get_close_matches(name, known, 1, 0.7)
    near = near or difflib.get_close_matches(f"twinflow_{name}", known, 1, 0.8)
    hint = f"did you mean {near[0]!r}?" if near else "`twinflow train --help` lists them all"
    return ValueError(f"train: unknown option {shown(spelling)}; {hint}")
