"""Writes the tables of README and docs from benchmarks/results/: `python benchmarks/readme_tables.py [--check]`."""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fit_tables import batch_table, deferral_table, fit_table
from report import kernels_table, table, training_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/experiments.md", "docs/memory.md", "docs/performance.md")
DEMOS = {
    "digits_cpu.json": "make demo",
    "digits_all_terms_cpu.json": "examples/digits.py --recipe all_terms",
    "digits_full_cpu.json": "examples/digits.py --full",
}


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def _load(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    return [(path.name, _read(path.name)) for path in sorted(RESULTS.glob(pattern))]


def _machine(machine: dict[str, Any]) -> str:
    return f"{machine['device']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"


def _caption(machine: dict[str, Any], command: str) -> str:
    return f"{_machine(machine)}, torch {machine['torch']}; `{command}`."


def _span(ratios: list[float]) -> str:
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x"


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


def schedule_claims() -> Iterator[str]:
    """How much faster a planned step is than a published one, over models and batches."""
    for _, report in _load("a100_1024_*.json"):
        lines = [line for line in report.get("training", []) if line["recipe"] == "partition"]
        seconds = {(x["model"], x["batch"], x["schedule"]): x["median_s"] for x in lines if "median_s" in x}
        ratios = [
            seconds[model, batch, "published schedule"] / planned
            for (model, batch, schedule), planned in seconds.items()
            if schedule == "planned" and (model, batch, "published schedule") in seconds
        ]
        models = " and ".join(dict.fromkeys(line["model"] for line in lines))
        yield (
            f"**Schedule.** A training step runs at {_span(ratios)} the speed of the published schedule, with the same "
            f"loss and gradients ({models}; {_machine(report['machine'])}; `python benchmarks/a100_1024.py`)."
        )


def quality_claim() -> str:
    """The demo's images of one network call, before and after TwinFlow."""
    name, command = next(iter(DEMOS.items()))
    report = _read(name)
    scores = {row["model"]: f"{row['frechet']:.3f}" for row in report["rows"] if row["steps"] == 1}
    return (
        f"**Quality.** With one network call the base model's digits lie at a Fréchet distance of {scores['base']} "
        f"from real ones, TwinFlow's at {scores['TwinFlow']}, after {report['seconds']:.0f} s of training both "
        f"(CPU, {report['threads']} threads; `{command}`)."
    )


def kernel_claims() -> Iterator[str]:
    """The loss on eight rows of SD3's latents at 1024x1024, beside its peers."""
    for _, report in _load("velocity_loss_*.json"):
        cases = [case["contestants"] for case in report["cases"] if case["name"].startswith("(8, 16, 128, 128)")]
        eager, compiled = (_span([case[peer]["ratio"] for case in cases]) for peer in ("eager", "torch.compile"))
        source = f"{_machine(report['machine'])}; `python benchmarks/bench_velocity_loss.py`"
        yield (
            f"**Kernels.** `velocity_loss` on (8, 16, 128, 128) runs at {eager} the speed of eager PyTorch and at "
            f"{compiled} that of `torch.compile` ({source})."
        )


def claims() -> str:
    """What was measured, a line each with its device."""
    return "\n".join(f"- {line}" for line in (*schedule_claims(), quality_claim(), *kernel_claims()))


def forecast_speed() -> str:
    """The planner's least time of a step of the largest model, by how it runs."""
    group = _read("will_it_fit.json")["beside_peers"][0]
    seconds = {line["name"]: line["seconds"] for line in group["forecasts"]}
    published, planned, kept = (seconds[name] for name in ("published schedule", "checkpoint", "80gb"))
    model, trained, size = group["workload"].split(", ")[:3]
    run = f"{model}, {trained}, {size}, batch 4, one A100; `python benchmarks/will_it_fit.py`"
    return (
        f"- **Forecast**, least time of a step ({run}): {published:.1f} s by the published schedule, "
        f"{planned:.1f} s by ours ({published / planned:.2f}x), {kept:.1f} s by ours with preset `80gb` "
        f"({published / kept:.2f}x)."
    )


def host() -> str:
    """The host's part of a step, on a network that does next to nothing."""
    texts = [(RESULTS / name).with_suffix(".md").read_text().strip() for name, _ in _load("host_overhead_*.json")]
    return "\n\n".join(f"`python benchmarks/host_overhead.py`: {text}" for text in texts)


def digits() -> str:
    """The demo's tables: the default run, and what other runs of it gave."""
    parts = []
    for name, command in DEMOS.items():
        report = _read(name)
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


def fit_lora() -> str:
    """What a LoRA's step needs on which card."""
    head, rows = fit_table(_read("will_it_fit.json"), "partition")
    lora = [row for row in rows if row[1].startswith("LoRA")]
    caption = (
        f"Fastest preset that fits, and its peak in GB ({lora[0][1]}, 1024x1024, batch 4, N = 2; in brackets, what the "
        "card's allocator can hand out; `python benchmarks/will_it_fit.py`):"
    )
    return f"{caption}\n\n{table([head[0], *head[2:]], [[row[0], *row[2:]] for row in lora])}"


def fit() -> str:
    """The planner's tables: what fits on which card, and how little a larger batch adds."""
    report = _read("will_it_fit.json")
    parts = [
        "Fastest preset that fits, and its peak in GB; `no:` the least that is needed. 1024x1024, batch 4, N = 2; "
        "in brackets what the card's allocator can hand out, GB. `python benchmarks/will_it_fit.py`; both recipes, and "
        "peers, in `benchmarks/results/will_it_fit.md`.",
        table(*fit_table(report, "partition")),
        "Peak in GB by logical batch, row by row:",
        table(*batch_table(report)),
    ]
    return "\n\n".join(parts)


def deferral() -> str:
    """What deferring the modulation saves and costs, by model."""
    report = _read("will_it_fit.json")
    caption = "Where it pays, by the planner (`python benchmarks/will_it_fit.py`); s/step at least, on an A100:"
    return f"{caption}\n\n{table(*deferral_table(report))}"


def study(name: str) -> str:
    """A study's table as it was written beside its results, and what it ran on."""
    machine = _read(f"{name}_cpu.json")["machine"]
    caption = _caption(machine, f"python benchmarks/{name}.py")
    return f"{caption} {(RESULTS / f'{name}_cpu.md').read_text().strip()}"


def render(text: str) -> str:
    """A page with its generated parts made anew."""
    parts = {
        "claims": claims,
        "forecast-speed": forecast_speed,
        "fit-lora": fit_lora,
        "host": host,
        "digits": digits,
        "stability": lambda: study("stability"),
        "step_focus": lambda: study("step_focus"),
        "conditioning": lambda: study("conditioning"),
        "fit": fit,
        "deferral": deferral,
        "kernels": kernels,
        "compiled": lambda: (RESULTS / "compiled_kernels.md").read_text().strip(),
        "training": training,
    }
    for name, make in parts.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)
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
