"""README and docs: examples run as printed, tables are what the results give; commands, links and paths exist."""

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers.family_batches import make_batch
from helpers.tiny_pipelines import saved_pipeline, tiny_transformer

from twinflow import EMATeacher, TwinFlowLoss
from twinflow.cli import main
from twinflow.lora import add_lora
from twinflow.memory import apply_memory
from twinflow.models import FAMILIES, load

ROOT = Path(__file__).resolve().parent.parent
README, MEMORY = ROOT / "README.md", ROOT / "docs" / "memory.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def run(code: str, scope: dict, changes: dict[str, str]) -> dict:
    """Runs an example with some of its words replaced, each of which must be there."""
    for printed, tiny in changes.items():
        assert printed in code
        code = code.replace(printed, tiny)
    exec(compile(code, "example", "exec"), scope)
    return scope


def test_no_example_is_left_out():
    assert [(page.name, len(blocks(page))) for page in PAGES if blocks(page)] == [("README.md", 2), ("memory.md", 1)]


def test_the_loop_runs_as_printed():
    code = blocks(README)[0]
    assert len([line for line in code.splitlines() if line.strip()]) == 12
    torch.manual_seed(0)
    scope = run(code, {}, {})
    torch.manual_seed(0)
    untouched = scope["Student"](76, 64)
    assert not torch.equal(scope["student"].weight, untouched.weight), "the example trains nothing"
    assert all(torch.isfinite(p).all() for p in scope["student"].parameters())


def test_the_pipeline_example_runs_as_printed(tmp_path):
    """On a tiny pipeline of the named model's class, with sizes to match."""
    changes = {
        '"stabilityai/stable-diffusion-3.5-medium"': repr(str(saved_pipeline("sd3"))),
        '"few-step"': repr(str(tmp_path / "few-step")),
        "torch.randn(1, 16, 64, 64)": "torch.randn(1, 16, 8, 12)",
        "num_inference_steps=2)": "num_inference_steps=2, height=16, width=24)",
    }
    scope = run(blocks(README)[1], {}, changes)
    assert scope["image"].size == (24, 16) and (tmp_path / "few-step" / "pytorch_lora_weights.safetensors").exists()


def test_the_memory_example_runs_as_printed():
    """On a tiny model and the CPU, whose memory must be said."""
    torch.manual_seed(0)
    transformer = tiny_transformer("sd3").to(torch.bfloat16)
    scope = {"transformer": transformer, "add_lora": add_lora, "load": load, "EMATeacher": EMATeacher}
    scope |= {"apply_memory": apply_memory, "criterion": TwinFlowLoss()}
    scope |= zip(("latents", "cond", "uncond"), make_batch("sd3", load(transformer), 2, torch.bfloat16), strict=True)
    changes = {'device="cuda", resolution=1024': 'device="cpu", memory_gb=1.0, resolution=256'}
    run(blocks(MEMORY)[0], scope, changes)
    gradients = {n: p.grad for n, p in scope["student"].named_parameters() if p.grad is not None}
    assert gradients["transformer.transformer_blocks.0.attn.to_q.lora_B.default.weight"].any()


def test_tables_come_from_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 160
    assert re.search(r"make demo.*make test", "\n".join(README.read_text().splitlines()[:20]), re.DOTALL)


def test_the_table_of_models_is_true():
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", README.read_text(), re.MULTILINE)
    table = {name: (sampling.startswith("no:"), "ComfyUI" in exports) for name, _, sampling, exports in rows}
    known = [model for model in FAMILIES.values() if hasattr(model, "transformer_class")]
    assert table == {m.transformer_class: (not m.samples_in_pipelines, m.comfyui) for m in known}


def commands(page: Path) -> list[list[str]]:
    """Words of the `twinflow` commands in a page's shell examples and inline code."""
    text = page.read_text()
    lines = "\n".join(blocks(page, "sh")).splitlines() + re.findall(r"`(twinflow \w+ [^`]+)`", text)
    parts = [part for line in lines for part in line.partition(" #")[0].split(" && ")]
    found = [part.partition("twinflow ")[2] for part in parts if re.match(r"(.* -m )?twinflow \w", part)]
    return [shlex.split(words) for words in found if "--help" not in words]


@each_page
def test_commands_of_the_program_are_understood(page, monkeypatch):
    """Every option and value is taken; nothing is run."""
    for words in commands(page):
        taken = []
        monkeypatch.setattr(import_module(f"twinflow.cli.{words[0]}"), "run", taken.append)
        assert main(words) is None and len(taken) == 1, words


def test_commands_are_looked_at():
    assert sum(len(commands(page)) for page in PAGES) > 15


@each_page
def test_commands_of_the_repository_exist(page):
    makefile, text = (ROOT / "Makefile").read_text(), page.read_text()
    for target in re.findall(r"(?:^|`)make (?:[A-Z]+=\S+ )?([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no make target {target}"
    for script in re.findall(r"(?:python|bash) ((?:benchmarks|examples|tests)/\w+\.\w+)", text):
        assert (ROOT / script).exists(), script


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"
    named = re.findall(r"`((?:twinflow|twinflow_kernels|csrc|tests|benchmarks|examples|docs)/[\w/.]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
