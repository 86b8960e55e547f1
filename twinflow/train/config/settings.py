"""`TrainSettings`: everything that `twinflow train` was asked for, checked and resolved in one place."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from twinflow.objective.config import TwinFlowConfig
from twinflow.train.config.command_line import given_options
from twinflow.train.config.json_file import read_json
from twinflow.train.config.objective import FLOW_MATCHING
from twinflow.train.config.options import OPTIONS, named
from twinflow.train.config.resolve import resolve


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of a run; `twinflow.train.config.options` says what each means.

    Args:
        twinflow: the objective; None: plain flow matching.
        twinflow_options: what `TwinFlowConfig.from_flags` leaves to the trainer, for `teacher_from_options`.
        warnings: what was asked for and is not done, in words.
    """

    preset: str | None
    pretrained_model_name_or_path: str
    model_family: str | None
    model_type: str
    prediction_type: str | None
    lora_rank: int
    lora_alpha: float
    lora_layers: tuple[str, ...]
    base_lora: Path | None
    conditioning: str | None
    instance_data_dir: Path | None
    prompts_file: Path | None
    metadata_file: Path | None
    caption_strategy: str
    caption_column: str
    image_column: str
    unconditional_prompt: str
    resolution: int
    aspect_buckets: bool
    aspect_bucket_alignment: int
    eval_share: float
    skip_bad: bool
    cache_dir: Path
    vae_batch_size: int
    text_batch_size: int
    train_batch_size: int
    gradient_accumulation_steps: int
    max_train_steps: int
    seed: int
    mixed_precision: str
    memory_preset: str
    gradient_checkpointing: bool
    compile_blocks: bool
    optimizer: str
    learning_rate: float
    lr_scheduler: str
    lr_warmup_steps: int
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    adam_weight_decay: float
    max_grad_norm: float
    use_ema: bool
    ema_decay: float
    ema_device: str
    output_dir: Path
    resume_from_checkpoint: str
    checkpointing_steps: int
    checkpoints_total_limit: int
    report_to: str
    logging_steps: int
    tracker_project_name: str
    tracker_run_name: str
    debug: bool
    validation_prompts: tuple[str, ...]
    validation_negative_prompt: str
    validation_steps: int
    validation_guidance: float
    validation_num_inference_steps: int
    validation_seed: int
    validation_resolution: tuple[int, int]  # width, height
    eval_steps: int
    disable_benchmark: bool
    twinflow: TwinFlowConfig | None
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
        """Raises ValueError where there is nothing to train on: a config may be looked at without."""
        if self.instance_data_dir is None and self.prompts_file is None:
            raise ValueError(
                "train: instance_data_dir must be given, a folder of images (or prompts_file), got neither"
            )
        if self.twinflow is not None and self.twinflow.data_free and self.prompts_file is None:
            raise ValueError("train: prompts_file must be given where twinflow.data_free is true, got nothing")

    def to_json(self) -> str:
        """The settings as a config file, which `read_config` reads as the same settings."""
        own = {name: getattr(self, name) for name in OPTIONS if name in _FIELDS and name != "twinflow"}
        objective = None if self.twinflow is None else self.twinflow.to_dict()
        found = {**own, **self.twinflow_options, "twinflow": objective}
        return json.dumps(found, indent=1, default=str) + "\n"


_FIELDS = tuple(f.name for f in fields(TrainSettings))


def read_config(path: Path | None, overrides: Mapping[str, Any]) -> TrainSettings:
    """The settings of a config file and of options that override it.

    Args:
        path: a JSON file; None: there is none.
        overrides: option -> value, as a file has them or as text; None and "" mean the default, whatever the file says.

    Returns:
        The settings. Nothing but the file itself was looked at.

    Raises:
        ValueError: one line that says what is wrong.
    """
    given = {} if path is None else named(read_json(Path(path)))
    return TrainSettings(**resolve(given | named(overrides)))


def settings_from(namespace: argparse.Namespace) -> TrainSettings:
    """The settings of a command line that `add_options` has declared.

    Raises:
        ValueError: one line that says what is wrong.
    """
    return read_config(getattr(namespace, "config", None), given_options(namespace))
