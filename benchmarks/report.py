"""The benchmark's report: markdown tables and a picture."""

from pathlib import Path
from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def kernels_table(results: list[dict[str, Any]]) -> str:
    """One line per operation: ours, the plain copy's share, and the peers' time over ours."""
    rows = []
    for result in results:
        ours = result["contestants"]["twinflow"]
        peers = [f"{name} {c['ratio']:.2f}x" for name, c in result["contestants"].items() if name != "twinflow"]
        rows.append(
            [f"`{result['op']}` {result['name']}", f"{ours['median_us']:.0f}", f"{ours['gb_per_s']:.1f}",
             f"{ours['percent_of_copy']:.0f} %", ", ".join(peers)]
        )  # fmt: skip
    return table(["kernel", "µs", "GB/s", "of copy", "time of peers over ours"], rows)


def training_table(lines: list[dict[str, Any]]) -> str:
    """One line per model, recipe, batch and schedule."""
    rows = []
    for line in lines:
        base = next(x for x in lines if _contest(x) == _contest(line))
        no_gradient = f"{line['rows_without_gradient']:.1f}"
        head = [line["model"], line["recipe"], str(line["batch"]), line["schedule"], no_gradient]
        if "median_s" not in line:
            rows.append([*head, "out of memory", "", ""])
            continue
        ratio = f"{base['median_s'] / line['median_s']:.2f}x" if "median_s" in base else ""
        rows.append([*head, f"{line['median_s']:.3f}", ratio, f"{line['peak_bytes'] / 1e9:.2f}"])
    head = ["model", "recipe", "batch", "schedule", "rows without gradient", "s/step", "speed-up"]
    return table([*head, "peak GB above weights"], rows)


def _contest(line: dict[str, Any]) -> tuple[str, str, int]:
    return line["model"], line["recipe"], line["batch"]


def inference_table(lines: list[dict[str, Any]]) -> str:
    """One line per model and number of steps."""
    rows = [
        [x["model"], str(x["steps"]), f"{x['samples_per_s']:.2f}", f"{x['latency_s']:.4f}",
         f"{x['sampler_s'] * 1e3:.2f}"]
        for x in lines
    ]  # fmt: skip
    return table(["model", "steps", "samples/s at batch 10", "s at batch 1", "sampler ms at batch 1"], rows)


_NOTES = {"inference": ["Transformer and sampler; text encoders and VAE are not counted."]}


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    machine = report["machine"]
    parts = [
        f"# 1024x1024 latent shapes, {report['dtype']}",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}, "
        f"{report['seconds']:.0f} s in all.",
    ]
    if report["notice"]:
        parts.append(f"**{report['notice']}**")
    tables = {"kernels": kernels_table, "training": training_table, "inference": inference_table}
    for name, make in tables.items():
        if name in report:
            parts += [f"## {name.capitalize()}", *_NOTES.get(name, []), make(report[name])]
    return "\n\n".join(parts) + "\n"


def picture(report: dict[str, Any], path: Path) -> None:
    """Bars of step time and peak memory by schedule, and throughput by number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 6), constrained_layout=True)
    lines = report.get("training", [])
    groups = list(dict.fromkeys(_contest(x) for x in lines))
    schedules = list(dict.fromkeys(x["schedule"] for x in lines))
    panels = [("median_s", 1.0, "seconds per training step"), ("peak_bytes", 1e-9, "peak GB above weights")]
    for axis, (key, scale, title) in zip(axes, panels, strict=False):
        for i, schedule in enumerate(schedules):
            found = {_contest(x): x.get(key) for x in lines if x["schedule"] == schedule}
            at = [g + (i - (len(schedules) - 1) / 2) * 0.2 for g in range(len(groups))]
            axis.bar(at, [(found.get(g) or 0) * scale for g in groups], width=0.18, label=schedule)
        names = [f"{model}, {recipe}, batch {batch}" for model, recipe, batch in groups]
        axis.set_xticks(range(len(groups)), names, rotation=60, ha="right", fontsize=7)
        axis.set(title=title, yscale="log")
    if lines:
        axes[0].legend(fontsize=8)
    inference = report.get("inference", [])
    for model in dict.fromkeys(x["model"] for x in inference):
        mine = [x for x in inference if x["model"] == model]
        axes[2].plot([x["steps"] for x in mine], [x["samples_per_s"] for x in mine], marker="o", label=model)
    axes[2].set(title="samples per second at batch 10", xlabel="sampling steps", xticks=[1, 2, 4], yscale="log")
    if inference:
        axes[2].legend(fontsize=8)
    figure.suptitle(f"1024x1024 latent shapes, {report['dtype']}, {report['machine']['device']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
