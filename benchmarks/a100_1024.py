"""TwinFlow at 1024x1024 latent shapes: kernels, the training step, inference.

    python benchmarks/a100_1024.py [--model sd3.5-medium sana-1.6b ...] [--batches 4 24] [--out benchmarks/results]

The networks are diffusers' own transformers with random weights. With a CUDA device they have a real model's size and
run in bf16. Without one, tiny configurations stand in: the run shows that everything works, in under three minutes, and
its figures say nothing about a GPU. Writes a JSON file, a markdown table and a picture.
"""

import argparse
import json
import time
from pathlib import Path

import environment
import networks
import torch
from inference import measure_inference
from kernels_section import measure_kernels
from report import markdown, picture
from training_step import measure_training

CPU_NOTICE = (
    "No CUDA device: tiny configurations stand in for the real ones. These CPU figures show that the parts work and "
    "how the schedules compare with each other; they are not comparable with figures from a GPU."
)
ON_CUDA = ("sd3.5-medium", "sana-1.6b", "sana-0.6b", "qwen-image")
ON_CPU = ("tiny-sana", "tiny-qwen-image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", choices=list(networks.NETWORKS), help=f"default: {', '.join(ON_CUDA)}")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 24], help="logical batch sizes")
    parser.add_argument("--steps", type=int, default=4, help="training steps measured per schedule")
    parser.add_argument("--skip", nargs="*", default=[], choices=["kernels", "training", "inference"])
    parser.add_argument("--out", type=Path, default=environment.ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    device = torch.device(options.device)
    models = options.model or list(ON_CUDA if device.type == "cuda" else ON_CPU)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type != "cuda":
        print(CPU_NOTICE + "\n")
    start = time.perf_counter()
    report = {
        "machine": environment.describe(device), "models": models, "dtype": str(dtype).removeprefix("torch."),
        "notice": None if device.type == "cuda" else CPU_NOTICE,
    }  # fmt: skip
    sections = {
        "kernels": lambda: measure_kernels(device),
        "training": lambda: [
            line for model in models for line in measure_training(model, device, dtype, options.batches, options.steps)
        ],
        "inference": lambda: [line for model in models for line in measure_inference(model, device, dtype)],
    }
    for name, measure in sections.items():
        if name not in options.skip:
            print(f"{name} ...", flush=True)
            report[name] = measure()
    report["seconds"] = time.perf_counter() - start
    options.out.mkdir(parents=True, exist_ok=True)
    # A run of chosen models has a file of its own beside the full one's.
    name = "_".join(["a100_1024", environment.device_slug(device), *(options.model or [])])
    stem = options.out / name.replace(".", "_")
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    stem.with_suffix(".md").write_text(text)
    picture(report, stem.with_suffix(".png"))
    print("\n" + text)
    print("written: " + ", ".join(stem.with_suffix(s).name for s in (".json", ".md", ".png")) + f" in {options.out}")


if __name__ == "__main__":
    main()
