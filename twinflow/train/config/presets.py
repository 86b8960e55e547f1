"""`TRAIN_PRESETS`: the rows of `--preset`: the training configurations of the paper's Table 6, and two of ours."""

from dataclasses import dataclass
from typing import Any

from twinflow.errors import ArgumentError
from twinflow.suggest import lookup


@dataclass(frozen=True)
class TrainPreset:
    """A training configuration.

    Args:
        name: of `--preset`.
        family, path: the model, on the hub.
        rank, alpha: of the LoRA; 0: all weights are trained.
        optimizer, learning_rate, beta2: constant rate, no weight decay, beta1 0.9.
        rows, micro_batches: of a step on one card; their product is the published batch, of all cards together.
        clip: bound of the gradient's norm; 0: none.
        ema: the teacher's decay; 0: the student is its own teacher (`StudentTeacher`), and no average is kept.
        objective: of `TwinFlowConfig.preset`.
    """

    name: str
    family: str
    path: str
    rank: int
    alpha: int
    optimizer: str
    learning_rate: float
    beta2: float
    rows: int
    micro_batches: int
    steps: int
    clip: float
    ema: float
    objective: str

    def options(self) -> dict[str, Any]:
        """Option -> value of what it sets."""
        lora = {"lora_rank": self.rank, "lora_alpha": self.alpha} if self.rank else {}
        average = {"use_ema": True, "ema_decay": self.ema} if self.ema else {"twinflow_allow_no_ema_teacher": True}
        return {
            "model_family": self.family, "model_type": "lora" if self.rank else "full",
            "pretrained_model_name_or_path": self.path,
            "optimizer": self.optimizer, "learning_rate": self.learning_rate, "adam_beta1": 0.9,
            "adam_beta2": self.beta2, "adam_weight_decay": 0.0, "train_batch_size": self.rows,
            "gradient_accumulation_steps": self.micro_batches, "max_train_steps": self.steps,
            "max_grad_norm": self.clip, "twinflow_enabled": True, **lora, **average,
        }  # fmt: skip


_SD35 = "stabilityai/stable-diffusion-3.5-"
_SANA = "Efficient-Large-Model/Sana_{}M_1024px_diffusers"
_QWEN = "Qwen/Qwen-Image"
# The paper has a longer run of Qwen-Image's whole weights too, of 10,000 steps.
# name                family        path                rank, alpha  optimizer  rate  beta2  batch  steps  clip  ema
_PUBLISHED = (
    ("sana-0.6b",         "sana",       _SANA.format(600),  0, 0,   "radam", 1e-4, .95, 16, 8, 30_000, 0., .99),
    ("sana-1.6b",         "sana",       _SANA.format(1600), 0, 0,   "radam", 1e-4, .99, 16, 8, 30_000, 0., .99),
    ("qwen-image-lora",   "qwen_image", _QWEN,              64, 64, "adamw", 1e-4, .99, 4, 16, 7_000,  1., 0.),
    ("qwen-image-full",   "qwen_image", _QWEN,              0, 0,   "adamw", 1e-5, .99, 4, 8,  3_000,  1., .99),
)  # fmt: skip
# Nobody has published these: settings of the paper's Qwen-Image LoRA with an averaged teacher.
_OURS = (
    ("sd3.5-medium-lora", "sd3",        _SD35 + "medium",   64, 64, "adamw", 1e-4, .99, 8, 8,  7_000,  1., .99),
    ("sd3.5-large-lora",  "sd3",        _SD35 + "large",    64, 64, "adamw", 1e-4, .99, 4, 16, 7_000,  1., .99),
)  # fmt: skip
TRAIN_PRESETS = {row[0]: TrainPreset(*row, row[0]) for row in _PUBLISHED}
TRAIN_PRESETS |= {row[0]: TrainPreset(*row, "sd3.5-medium") for row in _OURS}

# Columns of Table 6 that are no presets here, and why.
_LEFT_OUT = {
    "openuni-512": "OpenUni is no diffusers pipeline; TwinFlowConfig.preset('openuni-512') has its objective",
    "qwen-image-edit": "edit models, which look at a second image, are not trained here",
}


def train_preset(name: str) -> TrainPreset:
    """A preset by its name; ArgumentError: unknown, with the nearest names, or one that cannot be trained here."""
    if name in _LEFT_OUT:
        raise ArgumentError("train", "preset", f"one of {', '.join(TRAIN_PRESETS)}", repr(name), _LEFT_OUT[name])
    return lookup(TRAIN_PRESETS, name[:60], "train", "preset")  # on one line, whatever it is
