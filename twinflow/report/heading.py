"""`heading()`: the run in a few words and figures."""

from html import escape
from statistics import fmean, median

from twinflow.report.run import Run

_MODELS = {"lora": "LoRA of rank {rank}", "full": "all weights"}
_SHARE = 20  # means are over this part of the steps


def heading(run: Run) -> str:
    """Name, model and method, how far it is, the notes on what could not be read, and the figures."""
    name, share = escape(run.name), min(1.0, run.series.last / run.total) if run.total else 0.0
    notes = "".join(f"<li>{escape(complaint)}</li>" for complaint in run.complaints)
    listed = f'<ul class="notes">{notes}</ul>' if notes else ""
    return (
        '<header><p class="mark"><i></i><i></i>twinflow report</p>'
        f'<h1>{name}</h1><p class="what">{escape(_what(run))}</p>'
        f'<div class="bar" role="progressbar" aria-label="steps taken, percent" aria-valuenow="{100 * share:.0f}">'
        f'<b style="width:{share:.2%}"></b></div><p class="soft">{escape(_standing(run))}</p>{listed}'
        f'<dl class="figures">{"".join(_figures(run))}</dl></header>'
    )


def _what(run: Run) -> str:
    settings = run.settings
    if settings is None:
        return "No settings to read."
    parts = [settings.pretrained_model_name_or_path, _MODELS[settings.model_type].format(rank=settings.lora_rank)]
    config = settings.twinflow
    if config is None:
        return " · ".join([*parts, "plain flow matching"])
    count = config.target_step_count
    return " · ".join([*parts, f"TwinFlow, {config.recipe.replace('_', ' ')}", f"for {count} step{'s' * (count != 1)}"])


def _standing(run: Run) -> str:
    last, total = run.series.last, run.total
    said = [f"Step {last:,}" + (f" of {total:,}" if total else "")]
    if total and last < total:
        said[0] += ", not finished"
    seconds = run.series.values("seconds")
    if seconds:
        said.append(f"{duration(seconds[-1])} of training")
    if run.series.starts:
        said.append(f"begun {run.series.starts[0][1][:16].replace('T', ' ')}")
    steps = run.resumes
    if steps:
        where = ", ".join(f"{step:,}" for step in steps[:5]) + (", …" if len(steps) > 5 else "")
        said.append(f"resumed after step {where}")
    return " · ".join(said)


def _figures(run: Run) -> list[str]:
    """A term and its value each."""
    series, figures = run.series, []
    losses = series.values("loss")
    if losses:
        few = max(1, len(losses) // _SHARE)
        figures.append(
            _figure("Loss", f"{number(fmean(losses[-few:]))}", f"last twentieth; first: {number(fmean(losses[:few]))}")
        )
    held = [record for record in series.evaluations if record.get("loss") is not None]
    if held:
        best = min(held, key=lambda record: record["loss"])
        note = f"held-out images; best {number(best['loss'])} at step {best['step']:,}"
        figures.append(_figure("Evaluation loss", number(held[-1]["loss"]), note))
    else:
        figures.append(_figure("Evaluation loss", "–", "no evaluation so far"))
    for name, title, unit, note in (("s_per_step", "Time per step", "s", "median"),
                                    ("rows_per_s", "Throughput", "rows/s", "median, all processes")):  # fmt: skip
        if series.values(name):
            figures.append(_figure(title, number(median(series.values(name))), note, unit))
    peaks = series.values("peak_gb")
    if peaks:
        figures.append(_figure("Peak memory", number(max(peaks)), "of one device; GB = 1e9 bytes", "GB"))
    else:
        figures.append(_figure("Peak memory", "–", "not measured without CUDA"))
    return figures


def _figure(title: str, value: str, note: str, unit: str = "") -> str:
    shown = f"{escape(value)}{f' <small>{escape(unit)}</small>' if unit else ''}"
    return f"<div><dt>{escape(title)}</dt><dd><b>{shown}</b><span>{escape(note)}</span></dd></div>"


def number(value: float) -> str:
    """Three digits, or a whole number above a thousand."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """In the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"
