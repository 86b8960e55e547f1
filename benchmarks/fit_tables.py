"""Tables of benchmarks/will_it_fit.py's report."""

from typing import Any

from report import table


def fit_table(report: dict[str, Any], recipe: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Head and rows: per model and training the fastest preset on each card, of one recipe or of both."""
    kept = [row for row in report["rows"] if recipe in (None, row[2])]
    drop = 2 if recipe else None
    cut = lambda row: [cell for i, cell in enumerate(row) if i != drop]  # noqa: E731
    return cut(report["head"]), [cut(row) for row in kept]


def batch_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: peaks of the row-by-row presets by logical batch."""
    names = list(dict.fromkeys(name for line in report["by_batch"] for name in line["peak_bytes"]))
    rows = []
    for line in report["by_batch"]:
        peaks = [line["peak_bytes"].get(name) for name in names]  # None: it does not apply
        shown = ["" if peak is None else f"{peak / 1e9:.1f}" for peak in peaks]
        rows.append([line["model"], line["trained"], str(line["batch"]), *shown])
    return ["model", "trained", "batch", *names], rows


def deferral_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what deferring the modulation saves and costs, by model."""
    return report["deferral"]["head"], report["deferral"]["rows"]


def peers_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: our presets beside what one would otherwise run."""
    rows = []
    for group in report["beside_peers"]:
        model = group["workload"].split(", recipe")[0]
        for line in group["forecasts"]:
            fits = ", ".join(line["fits"]) or "none"
            rows.append([model, line["name"], f"{line['peak_bytes'] / 1e9:.1f}", f"{line['seconds']:.1f}", fits])
    return ["workload", "how it runs", "peak GB", "s/step on an A100, at least", "fits"], rows


def markdown(report: dict[str, Any]) -> str:
    """All of them."""
    made = (fit_table, deferral_table, batch_table, peers_table)
    return "\n\n".join(table(*each(report)) for each in made) + "\n"
