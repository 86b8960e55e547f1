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
    """One line per recipe, batch and schedule."""
    rows = []
    for line in lines:
        base = next(x for x in lines if (x["recipe"], x["batch"]) == (line["recipe"], line["batch"]))
        head = [line["recipe"], str(line["batch"]), line["schedule"], f"{line['rows_without_gradient']:.1f}"]
        if "median_s" not in line:
            rows.append([*head, "out of memory", "", ""])
            continue
        ratio = f"{base['median_s'] / line['median_s']:.2f}x" if "median_s" in base else ""
        rows.append([*head, f"{line['median_s']:.3f}", ratio, f"{line['peak_bytes'] / 1e9:.2f}"])
    head = ["recipe", "batch", "schedule", "rows without gradient", "s/step", "speed-up", "peak GB above weights"]
    return table(head, rows)


def inference_table(lines: list[dict[str, Any]]) -> str:
    """One line per number of steps."""
    rows = [
        [str(x["steps"]), f"{x['samples_per_s']:.2f}", f"{x['latency_s']:.4f}", f"{x['sampler_s'] * 1e3:.2f}"]
        for x in lines
    ]
    return table(["steps", "samples/s at batch 10", "s at batch 1", "sampler ms at batch 1"], rows)


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    machine = report["machine"]
    parts = [
        f"# 1024x1024 latent shapes, {report['model']} network, {report['dtype']}",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}, "
        f"{report['seconds']:.0f} s in all.",
    ]
    if report["notice"]:
        parts.append(f"**{report['notice']}**")
    tables = {"kernels": kernels_table, "training": training_table, "inference": inference_table}
    for name, make in tables.items():
        if name in report:
            parts += [f"## {name.capitalize()}", make(report[name])]
    return "\n\n".join(parts) + "\n"


def picture(report: dict[str, Any], path: Path) -> None:
    """Bars of step time and peak memory by schedule, and throughput by number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    lines = report.get("training", [])
    groups = list(dict.fromkeys((x["recipe"], x["batch"]) for x in lines))
    schedules = list(dict.fromkeys(x["schedule"] for x in lines))
    panels = [("median_s", 1.0, "seconds per training step"), ("peak_bytes", 1e-9, "peak GB above weights")]
    for axis, (key, scale, title) in zip(axes, panels, strict=False):
        for i, schedule in enumerate(schedules):
            found = {(x["recipe"], x["batch"]): x.get(key) for x in lines if x["schedule"] == schedule}
            at = [g + (i - (len(schedules) - 1) / 2) * 0.2 for g in range(len(groups))]
            axis.bar(at, [(found.get(g) or 0) * scale for g in groups], width=0.18, label=schedule)
        axis.set_xticks(range(len(groups)), [f"{recipe}\nbatch {batch}" for recipe, batch in groups])
        axis.set_title(title)
    if lines:
        axes[0].legend(fontsize=8)
    inference = report.get("inference", [])
    axes[2].bar([str(x["steps"]) for x in inference], [x["samples_per_s"] for x in inference], color="tab:green")
    axes[2].set(title="samples per second at batch 10", xlabel="sampling steps")
    figure.suptitle(f"{report['model']} network, {report['dtype']}, {report['machine']['device']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
