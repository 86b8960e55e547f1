"""The trainer: from a folder of images, or prompts, and a config file to a few-step pipeline."""

from twinflow.train.config.command_line import add_options, require_known
from twinflow.train.config.describe import changed, step_guidance
from twinflow.train.config.settings import TrainSettings, read_config, settings_from

__all__ = [
    "TrainSettings",
    "add_options",
    "changed",
    "read_config",
    "require_known",
    "settings_from",
    "step_guidance",
]
