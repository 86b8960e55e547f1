"""The README: its example runs as printed, its tables are what the committed results give."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from helpers.family_batches import make_batch
from helpers.tiny_pipelines import saved_pipeline, tiny_transformer

from twinflow import EMATeacher, TwinFlowLoss
from twinflow.lora import add_lora
from twinflow.memory import apply_memory
from twinflow.models import load

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_printed():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) == 12
    scope: dict = {}
    before = torch.nn.Linear(76, 64)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), scope)
    student = scope["student"]
    assert student.weight.shape == before.weight.shape
    torch.manual_seed(0)
    untouched = scope["Student"](76, 64)
    assert not torch.equal(student.weight, untouched.weight), "the example trains nothing"
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_the_pipeline_example_runs_as_printed(tmp_path):
    """On a tiny pipeline of the named model's class, with sizes to match."""
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    changes = {
        '"stabilityai/stable-diffusion-3.5-medium"': repr(str(saved_pipeline("sd3"))),
        '"few-step"': repr(str(tmp_path / "few-step")),
        "torch.randn(1, 16, 64, 64)": "torch.randn(1, 16, 8, 12)",
        "num_inference_steps=2)": "num_inference_steps=2, height=16, width=24)",
    }
    for printed, tiny in changes.items():
        assert printed in code
        code = code.replace(printed, tiny)
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["image"].size == (24, 16) and (tmp_path / "few-step" / "pytorch_lora_weights.safetensors").exists()


def test_the_memory_example_runs_as_printed():
    """On a tiny model and the CPU, whose memory must be said."""
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[2]
    changes = {'device="cuda", resolution=1024': 'device="cpu", memory_gb=1.0, resolution=256'}
    for printed, tiny in changes.items():
        assert printed in code
        code = code.replace(printed, tiny)
    torch.manual_seed(0)
    transformer = tiny_transformer("sd3").to(torch.bfloat16)
    scope = {"transformer": transformer, "add_lora": add_lora, "load": load, "EMATeacher": EMATeacher}
    scope |= {"apply_memory": apply_memory, "criterion": TwinFlowLoss()}
    scope |= zip(("latents", "cond", "uncond"), make_batch("sd3", load(transformer), 2, torch.bfloat16), strict=True)
    exec(compile(code, "README.md", "exec"), scope)
    found = {n: p.grad for n, p in scope["student"].named_parameters() if p.grad is not None}
    assert found["transformer.transformer_blocks.0.attn.to_q.lora_B.default.weight"].any()


def test_tables_come_from_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_commands_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no make target {target}"
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).exists(), f"README links to {path}"
