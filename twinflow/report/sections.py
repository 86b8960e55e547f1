"""The page's sections as HTML: all that needs no script."""

import json
from html import escape
from typing import Any

from twinflow.report.content import SMALL, loss_columns
from twinflow.report.run import Run
from twinflow.train.config.describe import Line, grouped_lines
from twinflow.train.config.settings import OPTIONS
from twinflow.train.logging.trajectory import TITLE

_GUIDE = "".join(f"<p>{text}</p>" for text in (
    "A row is noised to the time <b>t</b>, 1 being noise and 0 data, and asked for the way from there to <b>r</b>.",
    "On the diagonal, r = t: the velocity at that time. On the floor, r = 0: the whole way in one step.",
    "A negative t asks for the way to the student's own samples; its rows teach the difference of the two.",
))  # fmt: skip


def section(key: str, title: str, about: str, body: str, more: str = "") -> str:
    """A section with its heading; `title` and `about` are text, `body` and `more` HTML."""
    head = f'<div class="head"><h2>{escape(title)}</h2><p>{escape(about)}</p>{more}</div>'
    return f'<section id="{key}" aria-label="{escape(title)}">{head}{body}</section>'


def empty(text: str) -> str:
    """What stands where there is nothing to show yet."""
    return f'<p class="empty">{escape(text)}</p>'


def switch(attribute: str, value: str, choices: tuple[tuple[str, str], ...]) -> str:
    """Buttons of which one is pressed, the first at the beginning."""
    buttons = "".join(
        f'<button type="button" data-kind="{kind}" aria-pressed="{str(k == 0).lower()}">{escape(label)}</button>'
        for k, (kind, label) in enumerate(choices)
    )
    return f'<div class="switch" role="group" data-{attribute}="{value}">{buttons}</div>'


def samples(run: Run) -> str:
    """A slider over the times that images were drawn at, and the images."""
    if not run.sets and run.base is None:
        return section("samples", "Samples", "", empty(_no_samples(run)))
    about = "Fixed prompts and seeds over training; the base model beside them. Arrow keys change the step."
    slider = (
        '<div class="slider"><output for="step"></output><button type="button" aria-label="earlier samples">‹</button>'
        '<input id="step" type="range" min="0" step="1" value="0" aria-label="samples after step" list="times">'
        '<datalist id="times"></datalist>'
        '<button type="button" aria-label="later samples">›</button></div>'
    )
    body = slider if run.sets else empty(f"{_no_samples(run)} The base model's are here already.")
    dialog = '<dialog aria-label="sample"><img alt=""><p></p><p class="soft"></p></dialog>'
    return section("samples", "Samples", about, f'<div data-samples>{body}<div class="set"></div>{dialog}</div>')


def _no_samples(run: Run) -> str:
    every = run.settings.validation_steps if run.settings else None
    if every == 0:
        return "No samples: validation_steps is 0."
    return f"No samples yet: they are drawn every {every:,} steps." if every else "No samples yet."


def loss(run: Run) -> str:
    """The chart of the loss, its terms and the evaluations."""
    about = "Per step, smoothed over a fortieth of the run; behind it the values, or their range. The loss has no unit."
    if not run.series.evaluations:
        about += " No evaluation so far."
    if not loss_columns(run) and not run.series.evaluations:
        return section("loss", "Loss", "", empty("No step has been measured yet."))
    more = switch("scale", "loss", (("linear", "linear"), ("log", "log")))
    return section("loss", "Loss", about, '<figure class="chart" data-chart="loss"></figure>', more)


def progress(run: Run) -> str:
    """Gradient norm, learning rate, time and memory."""
    if not run.series.steps:
        return section("progress", "Progress", "", empty("No step has been measured yet."))
    figures = []
    for key, (title, unit, column, *_) in SMALL.items():
        caption = f'<figcaption><h3>{title}</h3><span class="unit">{unit}</span></figcaption>'
        if run.series.values(column):
            figures.append(f'<figure class="chart" data-chart="{key}">{caption}</figure>')
        else:
            why = "Not measured: the run has no CUDA device." if key == "memory" else "Not measured."
            figures.append(f'<figure class="chart">{caption}{empty(why)}</figure>')
    about = "By step; dashed lines are resumes." if run.resumes else "By step."
    return section("progress", "Progress", about, f'<div class="small">{"".join(figures)}</div>')


def trajectory(run: Run) -> str:
    """The scatter of times, where TwinFlow is on."""
    seen, shown = run.series.trajectory.seen, len(run.series.trajectory.points)
    if not run.twinflow:
        return section("trajectory", TITLE, "", empty("TwinFlow is off: plain flow matching has no second time."))
    if not seen:
        return section("trajectory", TITLE, "", empty("No step with times has been logged yet."))
    about = f"Rows of steps by the times they were trained at, coloured by the sign of t; {shown:,} of {seen:,} logged."
    body = f'<div class="beside"><figure class="chart" data-scatter></figure><div class="guide">{_GUIDE}</div></div>'
    return section("trajectory", TITLE, about, body)


def config(run: Run) -> str:
    """The settings by group, what is not the default marked."""
    if run.settings is None:
        rows = [Line(name, _plain(value)) for name, value in run.config.items()]
        body = f'<div class="tables">{_table("config.json", rows)}</div>' if rows else empty("No config.json.")
        return section("config", "Config", "", body)
    groups = grouped_lines(run.settings)
    changed = sum(line.changed for lines in groups.values() for line in lines)
    tables = "".join(_table(group, lines) for group, lines in groups.items())
    notes = "".join(f"<li>{escape(warning)}</li>" for warning in run.settings.warnings)
    body = f'<div class="tables">{tables}</div>' + (f'<ul class="notes">{notes}</ul>' if notes else "")
    about = f"As resolved. {changed} settings are not the default; they are marked."
    return section("config", "Config", about, body, switch("only", "config", (("all", "all"), ("changed", "changed"))))


def environment(run: Run) -> str:
    """Versions and devices."""
    rows = [Line(name, _plain(value)) for name, value in run.environment.items()]
    body = f'<div class="tables">{_table("", rows)}</div>' if rows else empty("No environment.json.")
    return section("environment", "Environment", "Versions and devices that the run was last started with.", body)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(title: str, lines: list[Line]) -> str:
    rows = []
    for line in lines:
        mark = ' class="changed"' if line.changed else ""
        if not line.name:
            rows.append(f'<tr{mark}><td colspan="2">{escape(line.value)}</td></tr>')
            continue
        helped = f' title="{escape(OPTIONS[line.name].help)}"' if line.name in OPTIONS else ""
        rows.append(f'<tr{mark}{helped}><th scope="row">{escape(line.name)}</th><td>{escape(line.value)}</td></tr>')
    none = "" if any(line.changed for line in lines) else ' class="none"'
    own = ' class="own"' if title in ("TwinFlow", "config.json") else ""
    return f"<div{none}><h3{own}>{escape(title)}</h3><table>{''.join(rows)}</table></div>"
