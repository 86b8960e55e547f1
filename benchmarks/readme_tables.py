"""Writes the tables of README and docs from benchmarks/results/: `python benchmarks/readme_tables.py [--check]`."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from fit_tables import batch_table, deferral_table, fit_table
from report import kernels_table, table, training_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/memory.md")
DEMOS = {
    "digits_cpu.json": "make demo",
    "digits_all_terms_cpu.json": "examples/digits.py --recipe all_terms",
    "digits_full_cpu.json": "examples/digits.py --full",
}


def _load(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    return [(path.name, json.loads(path.read_text())) for path in sorted(RESULTS.glob(pattern))]


def _caption(machine: dict[str, Any], command: str) -> str:
    return f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; `{command}`."


def kernels() -> str:
    """The kernels' table, one per device."""
    by_device: dict[str, list[dict[str, Any]]] = {}
    captions = {}
    for path in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        op = path.stem.removeprefix("bench_")
        for _, report in _load(f"{op}_*.json"):
            device = report["machine"]["device"]
            captions.setdefault(device, _caption(report["machine"], "python benchmarks/bench_<op>.py"))
            by_device.setdefault(device, []).extend({"op": op, **case} for case in report["cases"])
    return "\n\n".join(f"{captions[device]}\n\n{kernels_table(cases)}" for device, cases in by_device.items())


def training() -> str:
    """The training step's table, one per device."""
    parts = []
    for _, report in _load("a100_1024_*.json"):
        if "training" not in report:  # a run of other sections
            continue
        caption = _caption(report["machine"], "python benchmarks/a100_1024.py")
        notice = f"\n\n{report['notice']}" if report["notice"] else ""
        parts.append(f"{caption}{notice}\n\n{training_table(report['training'])}")
    return "\n\n".join(parts)


def digits() -> str:
    """The demo's tables: the default run, and what other runs of it gave."""
    parts = []
    for name, command in DEMOS.items():
        report = json.loads((RESULTS / name).read_text())
        caption = (
            f"`{command}`, seed {report['seed']}: {report['base_steps']} steps of flow matching, then "
            f"{report['steps']} of TwinFlow, {report['seconds']:.0f} s in all on {report['threads']} CPU threads."
        )
        rows = []
        for row in report["rows"]:
            if name != "digits_cpu.json" and row["model"] != "TwinFlow":
                continue
            counts = row["class_counts"]
            scores = [f"{row['frechet']:.3f}", f"{row['accuracy']:.3f}", f"{min(counts)} to {max(counts)}"]
            rows.append([row["model"], str(row["steps"] or ""), row["style"], *scores])
        head = ["model", "steps", "style", "Fréchet distance", "label accuracy", "images per class"]
        parts.append(f"{caption}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def fit() -> str:
    """The planner's tables: what fits on which card, and how little a larger batch adds."""
    report = json.loads((RESULTS / "will_it_fit.json").read_text())
    parts = [
        "Fastest preset that fits, and its peak in GB; `no:` the least that is needed. 1024x1024, batch 4, N = 2; "
        "beside a card what its allocator can hand out, GB. `python benchmarks/will_it_fit.py`; both recipes, and "
        "peers, in `benchmarks/results/will_it_fit.md`.",
        table(*fit_table(report, "partition")),
        "Peak in GB by logical batch, row by row:",
        table(*batch_table(report)),
    ]
    return "\n\n".join(parts)


def deferral() -> str:
    """What deferring the modulation saves and costs, by model."""
    report = json.loads((RESULTS / "will_it_fit.json").read_text())
    caption = "Where it pays, by the planner (`python benchmarks/will_it_fit.py`); s/step at least, on an A100:"
    return f"{caption}\n\n{table(*deferral_table(report))}"


def study(name: str) -> str:
    """A study's table as it was written beside its results, and what it ran on."""
    machine = json.loads((RESULTS / f"{name}_cpu.json").read_text())["machine"]
    caption = _caption(machine, f"python benchmarks/{name}.py")
    return f"{caption} {(RESULTS / f'{name}_cpu.md').read_text().strip()}"


def render(text: str) -> str:
    """A page with its generated parts made anew."""
    parts = {
        "digits": digits,
        "stability": lambda: study("stability"),
        "step_focus": lambda: study("step_focus"),
        "conditioning": lambda: study("conditioning"),
        "fit": fit,
        "deferral": deferral,
        "kernels": kernels,
        "training": training,
    }
    for name, make in parts.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}\n{make()}\n\n{m[2]}", text, flags=re.DOTALL)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a page is not what the results give")
    check = parser.parse_args().check
    for page in PAGES:
        text = (ROOT / page).read_text()
        rendered = render(text)
        if check and rendered != text:
            sys.exit(f"{page}: its tables are not what benchmarks/results/ gives")
        if not check:
            (ROOT / page).write_text(rendered)


if __name__ == "__main__":
    main()
