"""The README: its example runs as printed, its tables are what the committed results give."""

import re
import subprocess
import sys
from pathlib import Path

import torch

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
