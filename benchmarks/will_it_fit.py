"""What fits on which card: the planner's forecasts for every model, and for what one would otherwise run.

    python benchmarks/will_it_fit.py [--out benchmarks/results] [--png docs/will_it_fit.png]

Needs no GPU; about a quarter of an hour on one core. Forecasts, not measurements: `benchmarks/a100_1024.py` sets them
beside what a GPU measures.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import environment
import torch
from fit_tables import markdown

from twinflow.memory.planner.architectures import architectures
from twinflow.memory.planner.choose import forecasts
from twinflow.memory.planner.forecast import Forecast, Planner
from twinflow.memory.planner.gpus import GPUS
from twinflow.memory.planner.overview import deferral_head, deferral_rows, head, rows
from twinflow.memory.planner.peers.forecast import peer_forecasts
from twinflow.memory.planner.plot import picture
from twinflow.memory.planner.report import as_json
from twinflow.memory.planner.workload import workload_of
from twinflow.objective.config import RECIPES

GPU = GPUS["a100-80gb"]  # whose speed the times are for
RANK = 64
PICTURED = (("qwen-image", RANK), ("sana-1.6b", None))
BATCHES = (1, 4, 24)


def by_batch() -> list[dict[str, Any]]:
    """Peaks of the pictured workloads' row-by-row presets, by logical batch."""
    lines = []
    for model, rank in PICTURED:
        for batch in BATCHES:
            planner = Planner(workload_of(model, lora_rank=rank, batch=batch))
            peaks = {f.name: f.peak for f in forecasts(planner) if f.preset.micro_batch == 1}
            lines.append({"model": model, "trained": planner.workload.trains, "batch": batch, "peak_bytes": peaks})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=environment.ROOT / "benchmarks" / "results")
    parser.add_argument("--png", type=Path, default=environment.ROOT / "docs" / "will_it_fit.png")
    options = parser.parse_args()
    groups: list[list[Forecast]] = []
    for model, rank, recipe in itertools.product(architectures(), (RANK, None), RECIPES):
        workload = workload_of(model, lora_rank=rank, recipe=recipe)
        print(f"{model}, {workload.trains}, {recipe} ...", flush=True)
        groups.append(forecasts(Planner(workload, GPU)))
    pictured = []
    for model, rank in PICTURED:
        print(f"{model} beside its peers ...", flush=True)
        workload = workload_of(model, lora_rank=rank)
        own = [f for f in forecasts(Planner(workload, GPU)) if f.name != "batch"]
        pictured.append(own + peer_forecasts(workload, GPU))
    report = {
        "machine": environment.describe(torch.device("cpu")),
        "head": head(), "rows": rows(groups),
        "deferral": {
            "head": deferral_head(),
            "rows": deferral_rows([found for found in groups if found[0].workload.recipe == "partition"]),
        },
        "forecasts": [as_json(found, None) for found in groups],
        "beside_peers": [as_json(found, None) for found in pictured], "by_batch": by_batch(),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "will_it_fit.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "will_it_fit.md").write_text(markdown(report))
    picture(pictured, options.png)


if __name__ == "__main__":
    main()
