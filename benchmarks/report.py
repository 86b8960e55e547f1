"""The benchmark's report: markdown tables and pictures."""

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


def memory_table(lines: list[dict[str, Any]]) -> str:
    """One line per configuration; what was not measured says why."""
    rows = []
    for line in lines:
        planned, measured = _gb(line["planned_bytes"]), _gb(line.get("peak_bytes"))
        difference = f"{line['difference']:+.1%}" if "difference" in line else ""
        seconds = f"{line['median_s']:.3f}" if "median_s" in line else ""
        if "median_s" in line and not line["finite"]:
            measured += " (losses not finite)"
        rows.append(
            [_whose(line), line["trained"], line["recipe"], str(line["batch"]), _how(line), planned or "nothing fits",
             measured or line["outcome"], difference, seconds, _smallest(line)]
        )  # fmt: skip
    head = ["model", "trained", "recipe", "batch", "how it runs", "planned GB", "measured GB", "difference", "s/step"]
    return table([*head, "smallest card"], rows)


def _gb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def _whose(line: dict[str, Any]) -> str:
    """The model, and how it was cut down or capped."""
    depth = f", {line['depth']} blocks" if line["depth"] else ""
    return line["model"] + depth + (f", cap {line['cap_gb']:g} GB" if line["cap_gb"] else "")


def _how(line: dict[str, Any]) -> str:
    return "published schedule, checkpointing" if line["run"] == "published" else line["run"]


def _smallest(line: dict[str, Any]) -> str:
    """The smallest card that the plan fits."""
    from twinflow.memory.planner.gpus import GPUS

    return min(line["fits"], key=lambda name: GPUS[name].usable_gb, default="none")


def inference_table(lines: list[dict[str, Any]]) -> str:
    """One line per model and number of steps."""
    rows = [
        [x["model"], str(x["steps"]), f"{x['samples_per_s']:.2f}", f"{x['latency_s']:.4f}",
         f"{x['sampler_s'] * 1e3:.2f}"]
        for x in lines
    ]  # fmt: skip
    return table(["model", "steps", "samples/s at batch 10", "s at batch 1", "sampler ms at batch 1"], rows)


_NOTES = {
    "memory": [
        "GB = 1e9 bytes. Planned: `torch.cuda.max_memory_allocated` as the planner predicts it for a CUDA device. "
        "Measured: the same after three steps of warm-up, each configuration in a process of its own, with AdamW and "
        "the average; every step has rows of each role, the one with most to hold last. Difference: of the plan from "
        "the measurement. Smallest card: that the plan fits; larger ones fit too."
    ],
    "inference": ["Transformer and sampler; text encoders and VAE are not counted."],
}


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
    tables = {
        "kernels": kernels_table, "training": training_table, "memory": memory_table, "inference": inference_table,
    }  # fmt: skip
    for name, make in tables.items():
        if name in report:
            parts += [f"## {name.capitalize()}", *_NOTES.get(name, []), make(report[name])]
            if name in report.get("out_of_memory", {}):
                parts.append(f"Out of memory: {', '.join(report['out_of_memory'][name])}.")
    return "\n\n".join(parts) + "\n"


def picture(report: dict[str, Any], path: Path) -> None:
    """Bars of step time and peak memory by schedule, and throughput by number of steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 6), layout="constrained")
    axes = figure.subplots(1, 3)
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


def memory_picture(lines: list[dict[str, Any]], path: Path) -> None:
    """A panel per model, recipe and batch: planned peaks as bars, measured ones as marks, cards and cap as lines."""
    from matplotlib.figure import Figure

    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(f"{_whose(line)}, {line['recipe']}, batch {line['batch']}", []).append(line)
    heights = [0.35 * len(group) + 1.3 for group in groups.values()]
    figure = Figure(figsize=(10, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(groups), 1, height_ratios=heights, squeeze=False)
    for axis, (title, group) in zip(axes[:, 0], groups.items(), strict=True):
        _memory_panel(axis, group)
        axis.set_title(f"{title}, {group[0]['trained']}", fontsize=10, loc="left", pad=16)
    axes[0, 0].legend(*_found_labels(axes[:, 0]), fontsize=8, loc="lower right")
    axes[-1, 0].set_xlabel("peak of a training step, GB (1e9 bytes)", fontsize=9)
    figure.savefig(path, dpi=110)


def _memory_panel(axis: Any, group: list[dict[str, Any]]) -> None:
    planned = [(line["planned_bytes"] or 0) / 1e9 for line in group]
    measured = [(line.get("peak_bytes") or 0) / 1e9 for line in group]
    widest = max(*planned, *measured)
    axis.barh(range(len(group)), planned, color="#9ec3e6", height=0.7, label="planned")
    known = [(size, y) for y, size in enumerate(measured) if size]
    if known:
        axis.scatter(*zip(*known, strict=True), marker="|", s=220, lw=2.5, color="#c0392b", label="measured", zorder=3)
    for y, line in enumerate(group):
        # On a CPU nothing is said of each run but its plan, and a refusal is too long for a picture.
        said = line["outcome"].partition(":")[0] if line["outcome"] not in ("measured", "planned only") else ""
        parts = [_gb(line["planned_bytes"]) or "nothing fits", _gb(line.get("peak_bytes")) or said]
        text = " | ".join(part for part in parts if part)
        right = max(planned[y], measured[y]) + widest * 0.012
        axis.text(right, y, text, va="center", fontsize=8, bbox=dict(color="white", pad=0.5))
    _limits(axis, group[0]["cap_gb"], widest)
    axis.set_yticks(range(len(group)), [_how(line) for line in group], fontsize=8)
    axis.set_ylim(len(group) - 0.4, -0.6)
    axis.set_xlim(0, widest * 1.25)
    axis.spines[["top", "right"]].set_visible(False)


def _limits(axis: Any, cap_gb: float | None, widest: float) -> None:
    """The cap, or what cards' allocators hand out; a number that has no room beside the last one is left out."""
    from twinflow.memory.planner.gpus import GPUS

    limits = [cap_gb] if cap_gb else sorted({gpu.usable_gb for gpu in GPUS.values()})
    free = 0.0
    for limit in limits:
        if limit > widest * 1.2:
            break
        axis.axvline(limit, color="#555555", lw=0.9, ls="--", zorder=0)
        if limit >= free:
            name = f"cap {limit:g} GB" if cap_gb else f"{limit:g} GB"
            axis.text(limit, -0.62, name, fontsize=7, ha="center", va="bottom", color="#555555")
            free = limit + widest * 0.075


def _found_labels(axes: Any) -> tuple[list[Any], list[str]]:
    """Handles and names of what any panel shows, once each."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    return list(found.values()), list(found)
