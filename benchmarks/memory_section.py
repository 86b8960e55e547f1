"""Peak memory: what the planner says beside what a step takes, and its time, for every way to run it."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import torch
from memory_run import MEASURED, PUBLISHED, Configuration

from twinflow.memory import PRESETS, MemoryPreset
from twinflow.memory.planner.choose import choose
from twinflow.memory.planner.forecast import Forecast, Planner
from twinflow.memory.planner.gpus import GPUS
from twinflow.memory.planner.simulation.deferral import obstacle

RUNS = (PUBLISHED, *PRESETS)
LIMIT_S = 300.0  # of one configuration: building 20B parameters at random, and seven steps
PLANNED_ONLY = "planned only"
_CHECKPOINTED = MemoryPreset(PUBLISHED, "input", None)  # its memory is that of gradient checkpointing


@dataclass(frozen=True)
class Asked:
    """What the section covers.

    Args:
        models, recipes, batches: all of them by one another.
        runs: some of `RUNS`.
        depth: number of blocks; None: all.
        cap_gb: GB (1e9 bytes) beyond which the allocator refuses, for which `auto` is a run too; None: no cap.
        steps: measured in each process, after a warm-up.
        limit_s: of each process.
    """

    models: tuple[str, ...]
    recipes: tuple[str, ...]
    batches: tuple[int, ...]
    runs: tuple[str, ...] = RUNS
    depth: int | None = None
    cap_gb: float | None = None
    steps: int = 4
    limit_s: float = LIMIT_S

    def groups(self) -> list[list[Configuration]]:
        """The runs of each model, recipe and batch; presets that do not apply to it are left out."""
        runs = (*self.runs, "auto") if self.cap_gb is not None else self.runs
        return [
            [c for run in runs if applies(c := Configuration(model, run, recipe, batch, self.depth, self.cap_gb))]
            for model in self.models
            for recipe in self.recipes
            for batch in self.batches
        ]


def applies(configuration: Configuration) -> bool:
    """Whether a configuration can be run so."""
    preset = PRESETS.get(configuration.run)
    return preset is None or obstacle(configuration.workload, preset) is None


def planned(group: list[Configuration]) -> dict[str, Forecast | str]:
    """Run -> its forecast, or why `auto` finds none."""
    planner, found = Planner(group[0].workload), {}
    for configuration in group:
        run = configuration.run
        if run == PUBLISHED:
            found[run] = planner.forecast(_CHECKPOINTED, PUBLISHED)
        elif run in PRESETS:
            found[run] = planner.forecast(PRESETS[run])
        else:
            known = [found[name] for name in PRESETS if name in found]
            try:
                found[run] = choose(planner, configuration.cap_gb, known)
            except ValueError as error:
                found[run] = str(error)
    return found


def measured(configuration: Configuration, device: torch.device, steps: int, limit_s: float) -> dict[str, Any]:
    """Runs a configuration in a process of its own; whatever becomes of it is an outcome."""
    program = Path(__file__).with_name("memory_run.py")
    command = [sys.executable, str(program), *configuration.arguments(), "--steps", str(steps), "--device", str(device)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"outcome": f"over {limit_s:g} s"}
    results = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode == 0 and results:
        return json.loads(results[-1])
    return {"outcome": f"failed: {_reason(ended)}"}


def _reason(ended: subprocess.CompletedProcess[str]) -> str:
    """The last line of a process that failed; or its signal, as where the host has run out of memory."""
    if ended.returncode < 0:
        return f"signal {-ended.returncode}"
    last = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1]
    return re.sub(r"^(\w+\.)+(?=\w+: )", "", last)  # an error's class without its module


def _line(
    configuration: Configuration, forecast: Forecast | str, found: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """One run's part of the JSON; forecasts are of a CUDA device's peak, so that a CPU's is not compared with them."""
    line = {**vars(configuration), "trained": configuration.workload.trains, **found}
    if isinstance(forecast, str):
        return {**line, "planned_bytes": None, "refusal": forecast, "fits": []}
    line |= {
        "planned_bytes": forecast.peak, "at_peak": forecast.where, "parts": forecast.bytes,
        "fits": [gpu.name for gpu in GPUS.values() if forecast.fits(gpu.usable_gb)],
    }  # fmt: skip
    line.setdefault("preset", str(forecast.preset))
    if device.type == "cuda" and found["outcome"] == MEASURED:
        line["difference"] = forecast.peak / line["peak_bytes"] - 1
    return line


def _say(configuration: Configuration, found: dict[str, Any]) -> None:
    """At once, so that a run that is cut short has shown what it found."""
    result = found["outcome"]
    if result == MEASURED:
        result = f"{(found['peak_bytes'] or 0) / 1e9:.2f} GB, {found['median_s']:.3f} s"
    asked = f"{configuration.model}, {configuration.recipe}, batch {configuration.batch}, {configuration.run}"
    print(f"  {asked}: {result}", flush=True)


def measure_memory(asked: Asked, device: torch.device) -> list[dict[str, Any]]:
    """A line per configuration; a real model on a CPU is planned only.

    Args:
        asked: what to cover.
        device: where to measure.
    """
    environment.free_memory(device)  # the processes need what this one has cached
    lines = []
    for group in asked.groups():
        with ThreadPoolExecutor(1) as pool:
            planning = pool.submit(planned, group)  # meanwhile the processes run: a GPU waits for no plan
            found = []
            for configuration in group:
                if device.type == "cuda" or configuration.model.startswith("tiny"):
                    found.append(measured(configuration, device, asked.steps, asked.limit_s))
                    _say(configuration, found[-1])
                else:
                    found.append({"outcome": PLANNED_ONLY})
            forecasts = planning.result()
        lines += [_line(c, forecasts[c.run], f, device) for c, f in zip(group, found, strict=True)]
    return lines
