"""Forecasts made once a run: kept on disk by what was asked for, so that test processes share them."""

import functools
import hashlib
import os
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import diffusers
import peft
import torch

import twinflow
from twinflow.memory.planner import forecast as module
from twinflow.memory.planner.architectures import Architecture, architecture_of
from twinflow.memory.planner.forecast import Forecast
from twinflow.memory.planner.gpus import GPUS
from twinflow.memory.presets import MemoryPreset

SHORTER = {
    "qwen-image": {"num_layers": 7},
    "sd3.5-medium": {"num_layers": 11, "dual_attention_layers": [0, 1, 2, 3, 4]},
    "sana-1.6b": {"num_layers": 6},
    "flux.1": {"num_layers": 5, "num_single_layers": 7},
    "z-image": {"n_layers": 6},
}


def shorter(name: str) -> Architecture:
    architecture = architecture_of(name)
    return replace(architecture, config={**architecture.config, **SHORTER[name]})


@functools.cache
def folder() -> Path:
    """Where forecasts of the sources as they are now are kept: `TWINFLOW_TEST_CACHE`, or a folder of this run alone."""
    digest = hashlib.sha256(repr([torch.__version__, diffusers.__version__, peft.__version__]).encode())
    root = Path(twinflow.__file__).parent
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    kept = os.environ.get("TWINFLOW_TEST_CACHE") or tempfile.mkdtemp(prefix="twinflow-forecasts-")
    made = Path(kept) / "forecasts" / digest.hexdigest()[:16]
    made.mkdir(parents=True, exist_ok=True)
    return made


class Planner(module.Planner):
    """The planner, which answers what this run has asked before from disk.

    A test that changes the planner itself takes `twinflow.memory.planner.forecast.Planner`.
    """

    def forecast(self, preset: MemoryPreset, schedule: str = "planned") -> Forecast:
        if self._gpu is None:  # the same bytes, and times that nobody asked for
            made = Planner(self.workload, GPUS["a100-40gb"], self._whole).forecast(preset, schedule)
            return replace(made, cost=None)
        asked = repr((self.workload, self._gpu, self._whole, preset, schedule))
        path = folder() / hashlib.sha256(asked.encode()).hexdigest()
        if path.exists():
            return pickle.loads(path.read_bytes())
        made = super().forecast(preset, schedule)
        written = path.with_name(f"{path.name}.{os.getpid()}")
        written.write_bytes(pickle.dumps(made))
        written.replace(path)
        return made
