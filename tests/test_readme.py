"""The README: its example runs as printed, its tables are what the committed results give."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from tiny_pipelines import saved_pipeline

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
