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
    names = list(report["by_batch"][0]["peak_bytes"])
    rows = [
        [line["model"], line["trained"], str(line["batch"]), *(f"{line['peak_bytes'][n] / 1e9:.1f}" for n in names)]
        for line in report["by_batch"]
    ]
    return ["model", "trained", "batch", *names], rows


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
    return "\n\n".join(table(*made(report)) for made in (fit_table, batch_table, peers_table)) + "\n"
