"""`write_report()`: a run as one HTML page that needs nothing else."""

import base64
import hashlib
import json
from datetime import datetime, timezone
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from twinflow.atomic_files import write_file
from twinflow.errors import ArgumentError
from twinflow.report import sections
from twinflow.report.content import content
from twinflow.report.heading import heading
from twinflow.report.run import Run, read_run
from twinflow.train.config.run_folder import RunFolder

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("drawing.js", "chart.js", "scatter.js", "samples.js", "page.js")
_PARTS = (
    sections.samples, sections.loss, sections.progress, sections.trajectory, sections.config, sections.environment,
)  # fmt: skip


def write_report(run: RunFolder, to: Path | None = None) -> Path:
    """Writes a page about a run, however far it is: config, curves, samples over training, trajectory, environment.

    Nothing on the page is loaded from elsewhere, and its scripts are the only ones that it allows.

    Args:
        to: the file; None: `run.report`.

    Returns:
        The file.

    Raises:
        ValueError: it is no folder of a run, or there is no folder for the file.
        OSError: the file cannot be written.
    """
    contents, path = read_run(run), run.report if to is None else Path(to)
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "a folder" if path.is_dir() else "in a folder that does not exist"
        raise ArgumentError("write_report", "to", "a file in a folder that exists", f"{str(path)!r}, {what}")
    write_file(path, page(contents).encode(errors="backslashreplace"))
    return path


def page(run: Run) -> str:
    """The HTML of a run."""
    script = "".join(["(() => {\n", *((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS), "})();"])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    style = (_ASSETS / "page.css").read_text(encoding="utf-8")
    body = "".join(part(run) for part in _PARTS)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} · twinflow report</title><style>{style}</style></head>\n<body>{heading(run)}"
        '<noscript><p class="empty">Charts and samples need JavaScript.</p></noscript>'
        f'<main>{body}</main><footer>{_footer()}</footer><script type="application/json" id="data">'
        f"{for_script(content(run))}</script><script>{script}</script></body></html>\n"
    )


def for_script(value: Any) -> str:
    """JSON inside a script element: nothing in it can end the element, whatever texts it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _footer() -> str:
    try:
        made = f"twinflow {version('twinflow')}"
    except PackageNotFoundError:
        made = "twinflow"
    at = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return escape(f"Written by {made} on {at}. Times in seconds, GB = 1e9 bytes, losses without unit.")
