"""`content()`: what the page's scripts draw, as plain values."""

from typing import Any

from twinflow.report.pictures import data_uris
from twinflow.report.run import Run
from twinflow.report.samples import Sample, SampleSet, thinned
from twinflow.report.series import TERM, curves
from twinflow.train.logging.trajectory import SIGNS, TITLE

MOST_IMAGES = 600
WEIGHTS = {"ema": "EMA weights", "student": "student weights", "base": "base model"}
# id -> (title, unit in words, column, unit beside a value, raw line, colour)
SMALL = {
    "norm": ("Gradient norm", "before clipping", "grad_norm", "", True, "plain"),
    "rate": ("Learning rate", "of the optimizer", "learning_rate", "", False, "velocity"),
    "time": ("Time per step", "seconds, all processes together", "s_per_step", " s", True, "rcgm"),
    "memory": ("Peak memory", "GB (1e9 bytes) of one device", "peak_gb", " GB", False, "real_velocity"),
}


def content(run: Run) -> dict[str, Any]:
    """Everything that is drawn: curves, scatter and images, inside one object for JSON."""
    drawn = curves(run.series)
    columns = drawn["columns"]
    first = drawn["first"][0] if drawn["first"] else 0
    charts = [_loss_chart(run)] if loss_columns(run) or run.series.evaluations else []
    for key, (title, _, column, unit, raw, colour) in SMALL.items():
        if column in columns:
            series = {"label": title.lower(), "column": column, "unit": unit, "colour": colour, "raw": raw}
            charts.append({"id": key, "title": title, "height": 190, "zero": True, "series": [series], "points": []})
    dots = [[step, round(sigma, 4), round(r, 4), sign] for step, sigma, r, sign in run.series.trajectory.points]
    ends = [min(first, run.series.last), max(run.series.last, first + 1)]
    return {
        "run": {**drawn, "resumes": run.resumes, "range": ends},
        "charts": charts,
        "scatter": {"title": TITLE, "labels": list(SIGNS.values()), "points": dots},
        "samples": samples_content(run.sets, run.base),
        "total": run.total,
    }  # fmt: skip


def loss_columns(run: Run) -> list[str]:
    """The loss and its terms, those that have a value."""
    names = ["loss", *(name for name in run.series.columns if name.startswith(TERM))]
    return [name for name in names if run.series.values(name)]


def _loss_chart(run: Run) -> dict[str, Any]:
    names = [(name, name.removeprefix(TERM)) for name in loss_columns(run)]
    series = [{"label": "total" if name == "loss" else label.replace("_", " "), "column": name, "unit": "",
               "colour": label, "raw": True} for name, label in names]  # fmt: skip
    held = [record for record in run.series.evaluations if record.get("loss") is not None]
    points = {"label": "evaluation", "colour": "loss", "steps": [record["step"] for record in held],
              "values": [record["loss"] for record in held]}  # fmt: skip
    return {"id": "loss", "title": "Loss", "height": 340, "zero": False, "series": series,
            "points": [points] if held else []}  # fmt: skip


def samples_content(sets: list[SampleSet], base: SampleSet | None) -> dict[str, Any]:
    """The samples as a table: a row per prompt and seed, a column per way to sample, a set per time."""
    beside = base.images if base else []
    most = max([len(part.images) for part in sets], default=1)
    sets = thinned(sets, max(2, (MOST_IMAGES - len(beside)) // max(1, most)))
    images = [image for part in sets for image in part.images]
    uris = dict(zip([*images, *beside], data_uris([image.path for image in [*images, *beside]]), strict=True))
    rows = list(dict.fromkeys((image.prompt, image.seed) for image in [*images, *beside]))
    columns, base_columns = _columns(images), _columns(beside)
    return {
        "rows": [{"prompt": prompt, "seed": seed} for prompt, seed in rows],
        "columns": [{**_titled(k, column), "base": False} for k, column in enumerate(columns)],
        "baseColumns": [{**_titled(k, column), "title": "Base model", "base": True,
                         "under": f"{_count(column[0])}, guidance {column[2]:g}"}
                        for k, column in enumerate(base_columns)],
        "sets": [{"step": part.step, "weights": WEIGHTS.get(part.weights, part.weights),
                  "images": _table(part.images, rows, columns, uris)} for part in sets],
        "base": _table(beside, rows, base_columns, uris),
    }  # fmt: skip


def _way(image: Sample) -> tuple[int, str, float]:
    return image.steps, image.style, image.guidance


def _columns(images: list[Sample]) -> list[tuple[int, str, float]]:
    return sorted({_way(image) for image in images})


def _count(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)}"


def _titled(number: int, way: tuple[int, str, float]) -> dict[str, Any]:
    return {"number": number, "title": _count(way[0]), "under": f"{way[1]}, guidance {way[2]:g}"}


def _table(
    images: list[Sample], rows: list[tuple[str, int]], columns: list[tuple[int, str, float]], uris: dict[Sample, Any]
) -> list[list[dict[str, Any] | None]]:
    cells = {((image.prompt, image.seed), _way(image)): image for image in images}
    return [[_cell(cells.get((row, column)), uris) for column in columns] for row in rows]


def _cell(image: Sample | None, uris: dict[Sample, Any]) -> dict[str, Any] | None:
    if image is None:
        return None
    return {
        "uri": uris[image],
        "words": f"{_count(image.steps)}, {image.style}, guidance {image.guidance:g}, seed {image.seed}",
    }
