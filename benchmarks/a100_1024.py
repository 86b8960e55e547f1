"""TwinFlow at 1024x1024 latent shapes: kernels, the training step, its memory, inference.

    python benchmarks/a100_1024.py [--model sd3.5-medium sana-1.6b ...] [--batches 4 24] [--out benchmarks/results]

The networks are diffusers' own transformers with random weights. With a CUDA device they have a real model's size and
run in bf16. Without one, tiny configurations stand in: the run shows that everything works, in about three minutes, and
its figures say nothing about a GPU; of the memory of real models it then has what the planner says. Writes a JSON file,
a markdown table and pictures. A run of one section, or at a depth or a cap, has files of its own beside the full one's.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import harness
import memory_section
import networks
import torch
from inference import measure_inference
from memory_run import cap
from report import markdown, memory_picture, picture
from training_step import RECIPES, measure_training

CPU_NOTICE = (
    "No CUDA device: tiny configurations stand in for the real ones. These CPU figures show that the parts work and "
    "how the schedules compare with each other; they are not comparable with figures from a GPU."
)
ON_CUDA = ("sd3.5-medium", "sana-1.6b", "sana-0.6b", "qwen-image")
ON_CPU = ("tiny-sana", "tiny-qwen-image")
PLANNED_ON_CPU = ("qwen-image", "sana-1.6b")
SECTIONS = ("kernels", "training", "memory", "inference")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", choices=list(networks.NETWORKS), help=f"default: {', '.join(ON_CUDA)}")
    parser.add_argument("--batches", type=int, nargs="+", help="logical batch sizes (default: 4 24; planned only: 4)")
    parser.add_argument("--steps", type=int, help="training steps measured per schedule (default: 4; on a CPU 3)")
    parser.add_argument("--skip", nargs="*", default=[], choices=SECTIONS)
    parser.add_argument("--out", type=Path, default=environment.ROOT / "benchmarks" / "results")
    parser.add_argument("--depth", type=int, metavar="N", help="blocks of the models (default: all)")
    parser.add_argument(
        "--cap-gb", type=float, metavar="G", help="GB (1e9 bytes) beyond which the allocator refuses; adds `auto`"
    )
    memory = parser.add_argument_group("memory")
    memory.add_argument("--presets", nargs="+", choices=memory_section.RUNS, default=memory_section.RUNS)
    memory.add_argument("--recipes", nargs="+", choices=RECIPES, help="default: both; planned only: partition")
    asked = parser.parse_args()
    if asked.steps is None:
        asked.steps = 3 if asked.device == "cpu" else 4
    return asked


def measure_kernels(device: torch.device, seconds: float = 1.0) -> list[dict[str, Any]]:
    """Checks and times the first case of each operation."""
    return [
        {"op": op, **harness.measure(next(iter(cases(device))), device, seconds)}
        for op, cases in harness.bench_cases().items()
    ]


def measure_memory(asked: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The memory section; without a CUDA device the real models' plans, unless models are given."""
    on_cuda = device.type == "cuda"
    what = memory_section.Asked(
        models=tuple(asked.model or (ON_CUDA if on_cuda else PLANNED_ON_CPU)),
        recipes=tuple(asked.recipes or (RECIPES if on_cuda else RECIPES[:1])),
        batches=tuple(asked.batches or ((4, 24) if on_cuda else (4,))),
        runs=tuple(asked.presets), depth=asked.depth, cap_gb=asked.cap_gb, steps=asked.steps,
    )  # fmt: skip
    return memory_section.measure_memory(what, device)


def by_model(
    measure: Callable[[str], list[dict[str, Any]]], models: list[str], device: torch.device, left_out: list[str]
) -> list[dict[str, Any]]:
    """The lines of every model; those that do not fit in memory are named in `left_out`."""
    lines = []
    for model in models:
        try:
            lines += measure(model)
        except torch.OutOfMemoryError:
            left_out.append(model)
        environment.free_memory(device)
    return lines


def stem(asked: argparse.Namespace, device: torch.device) -> Path:
    """Path of the written files without their endings."""
    done = [name for name in SECTIONS if name not in asked.skip]
    parts = ["a100_1024", environment.device_slug(device), *(asked.model or [])]
    limits = {"depth": asked.depth, "cap": asked.cap_gb}
    parts += [f"{name}{value:g}" for name, value in limits.items() if value is not None]
    return asked.out / "_".join(parts + (done if len(done) == 1 else [])).replace(".", "_")


def write(report: dict[str, Any], to: Path) -> None:
    """The JSON, the tables and the pictures; prints the tables."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    to.with_suffix(".md").write_text(text)
    names = [to.with_suffix(".json").name, to.with_suffix(".md").name]
    if "training" in report or "inference" in report:
        picture(report, to.with_suffix(".png"))
        names.append(to.with_suffix(".png").name)
    if report.get("memory"):
        names.append(f"{to.name.removesuffix('_memory')}_memory.png")
        memory_picture(report["memory"], to.parent / names[-1])
    print("\n" + text)
    print(f"written: {', '.join(names)} in {to.parent}")


def main() -> None:
    asked = options()
    device = torch.device(asked.device)
    models = asked.model or list(ON_CUDA if device.type == "cuda" else ON_CPU)
    batches = asked.batches or [4, 24]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type != "cuda":
        print(CPU_NOTICE + "\n")
    start = time.perf_counter()
    report = {
        "machine": environment.describe(device), "models": models, "dtype": str(dtype).removeprefix("torch."),
        "notice": None if device.type == "cuda" else CPU_NOTICE,
    }  # fmt: skip
    cap(device, asked.cap_gb)
    left_out: dict[str, list[str]] = {"training": [], "inference": []}

    def training(model: str) -> list[dict[str, Any]]:
        return measure_training(model, device, dtype, batches, asked.steps, asked.depth)

    sections: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "kernels": lambda: measure_kernels(device),
        "training": lambda: by_model(training, models, device, left_out["training"]),
        "memory": lambda: measure_memory(asked, device),
        "inference": lambda: by_model(
            lambda model: measure_inference(model, device, dtype, asked.depth), models, device, left_out["inference"]
        ),
    }
    for name in SECTIONS:
        if name not in asked.skip:
            print(f"{name} ...", flush=True)
            report[name] = sections[name]()
    report["out_of_memory"] = {name: models for name, models in left_out.items() if models}
    report["seconds"] = time.perf_counter() - start
    write(report, stem(asked, device))


if __name__ == "__main__":
    main()
