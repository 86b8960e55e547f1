"""The trainer: from a folder of images, or prompts, and a config file to a few-step pipeline."""

from twinflow.train.config.describe import changed, step_guidance
from twinflow.train.config.resolve import read_config
from twinflow.train.config.settings import TrainSettings

__all__ = ["TrainSettings", "changed", "read_config", "step_guidance"]
