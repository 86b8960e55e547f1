"""The example loop runs as a user runs it: a pipeline folder and a folder of pictures in, a LoRA and a picture out."""

from pathlib import Path

import torch
from helpers.forks import run_script
from helpers.tiny_pipelines import saved_pipeline
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "diffusers_loop.py"


def test_the_loop_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 80


def test_the_loop_trains_exports_and_samples(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for k, picture in enumerate(load_sample_images().images):  # a temple and a flower, in the package
        Image.fromarray(picture).save(data / f"{k}.png")
        (data / f"{k}.txt").write_text(["a temple", "a flower"][k])
    size = 16
    numbers = {"--size": size, "--batch": 4, "--steps": 3, "--rank": 4, "--lr": 0.01}
    more = [str(word) for pair in numbers.items() for word in pair]
    folders = ["--pipeline", str(saved_pipeline("sd3")), "--data", str(data), "--out", str(out)]
    done = run_script(SCRIPT, *folders, *more, "--dtype", "float32", cwd=tmp_path)
    assert done.status == 0, done.err[-2000:]
    assert "step 0: loss" in done.out and f"written: {out}" in done.out
    assert Image.open(out / "sample.png").size == (size, size)
    lora = load_file(out / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.") for name in lora)
    moved = [value for name, value in lora.items() if "lora_B" in name]
    assert all(torch.isfinite(value).all() for value in lora.values()) and any(value.abs().sum() > 0 for value in moved)
