"""`picture()`: forecasts as stacked bars against the cards' memory."""

from pathlib import Path

from twinflow.memory.planner.forecast import LABELS, PARTS, Forecast
from twinflow.memory.planner.gpus import CONTEXT_BYTES, GPUS
from twinflow.memory.planner.report import headline

_COLOURS = {
    "weights": "#35618f", "adapters": "#5fa3d3", "optimizer": "#8c6bb1", "ema": "#c994c7", "gradients": "#dd6b66",
    "step": "#b8b8b8", "saved": "#f2a541", "transient": "#f6d186", "workspace": "#8a8a8a", "encoders": "#7aa874",
    "context": "#444444",
}  # fmt: skip
_CARDS = ("rtx-5080", "rtx-4090", "a100-40gb", "a100-80gb", "h200")


def picture(groups: list[list[Forecast]], path: Path) -> None:
    """Writes a PNG: a panel per workload, a bar per forecast, a line per card.

    Args:
        groups: forecasts, one list per workload.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [0.42 * len(found) + 1.5 for found in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(11, sum(heights)), height_ratios=heights, squeeze=False, constrained_layout=True
    )
    for axis, found in zip(axes[:, 0], groups, strict=True):
        _panel(axis, found)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: object, found: list[Forecast]) -> None:
    names = [forecast.name for forecast in found][::-1]
    left = [0.0] * len(found)
    for part in (*PARTS, "context"):
        sizes = [(CONTEXT_BYTES if part == "context" else f.bytes.get(part, 0)) / 1e9 for f in found][::-1]
        axis.barh(names, sizes, left=left, color=_COLOURS[part], label=LABELS[part], height=0.72)  # type: ignore[attr-defined]
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    widest = max(left)
    for y, total in enumerate(left):
        axis.text(total + widest * 0.008, y, f"{total:.1f}", va="center", fontsize=9)  # type: ignore[attr-defined]
    for name in _CARDS:
        limit = GPUS[name].usable_gb + CONTEXT_BYTES / 1e9
        if limit < widest * 1.25:
            axis.axvline(limit, color="#c0392b", lw=1, ls="--")  # type: ignore[attr-defined]
            axis.text(limit, len(found) - 0.4, name, color="#c0392b", fontsize=8, ha="center", va="bottom")  # type: ignore[attr-defined]
    axis.set_title(headline(found[0].workload), fontsize=10, loc="left", pad=16)  # type: ignore[attr-defined]
    axis.set_xlim(0, widest * 1.08)  # type: ignore[attr-defined]
    axis.set_xlabel("GB (1e9 bytes) on the card at the peak of a step", fontsize=9)  # type: ignore[attr-defined]
    axis.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]
