"""TwinFlow at 1024x1024 latent shapes: kernels, the training step, inference.

    python benchmarks/a100_1024.py [--model sd3.5-medium] [--quick] [--out benchmarks/results]

With a CUDA device the networks have a real model's width, depth and token counts and run in bf16. Without one, a small
network stands in: the run shows that everything works, in under three minutes, and its figures say nothing about a GPU.
Writes a JSON file, a markdown table and a picture.
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
    "No CUDA device: a small network stands in for a real one. These CPU figures show that the parts work and how the "
    "schedules compare with each other; they are not comparable with figures from a GPU."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=list(networks.MODELS), help="default: sd3.5-medium on CUDA, small elsewhere")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 24], help="logical batch sizes")
    parser.add_argument("--steps", type=int, default=4, help="training steps measured per schedule")
    parser.add_argument("--skip", nargs="*", default=[], choices=["kernels", "training", "inference"])
    parser.add_argument("--out", type=Path, default=environment.ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = options.model or ("sd3.5-medium" if device.type == "cuda" else "small")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type != "cuda":
        print(CPU_NOTICE + "\n")
    start = time.perf_counter()
    report = {
        "machine": environment.describe(device), "model": model, "dtype": str(dtype).removeprefix("torch."),
        "notice": None if device.type == "cuda" else CPU_NOTICE,
    }  # fmt: skip
    sections = {
        "kernels": lambda: measure_kernels(device),
        "training": lambda: measure_training(model, device, dtype, options.batches, options.steps),
        "inference": lambda: measure_inference(model, device, dtype),
    }
    for name, measure in sections.items():
        if name not in options.skip:
            print(f"{name} ...", flush=True)
            report[name] = measure()
    report["seconds"] = time.perf_counter() - start
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"a100_1024_{environment.device_slug(device)}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    stem.with_suffix(".md").write_text(text)
    picture(report, stem.with_suffix(".png"))
    print("\n" + text)
    print("written: " + ", ".join(stem.with_suffix(s).name for s in (".json", ".md", ".png")) + f" in {options.out}")


if __name__ == "__main__":
    main()
