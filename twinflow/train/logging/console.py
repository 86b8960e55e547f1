"""`Display`: what a run says in the terminal: bars where someone watches, lines where it is written to a file."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_EVERY_S = 5.0  # between lines of caching where nobody watches


class Display:
    """Speaks for the main process; on the others it is silent.

    Args:
        console: where to; None: standard output.
        speaks: whether this is the main process.
    """

    def __init__(self, console: Console | None = None, speaks: bool = True) -> None:
        self.console = console or Console(highlight=False, quiet=not speaks)
        self._speaks = speaks
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._caching: tuple[str, float] | None = None

    def say(self, text: str, style: str | None = None) -> None:
        """A message of its own; letters that the terminal's encoding lacks are written out."""
        if self._speaks:
            text = text.encode(self.console.encoding, "backslashreplace").decode(self.console.encoding)
            self.console.print(text, style=style, markup=False, soft_wrap=True)

    def caching(self, what: str, done: int, of: int) -> None:
        """How far an encoding is: a `Progress` for `build_cache`; the bar ends with its last part."""
        if not self._speaks or (of and not done):
            return
        if of == 0:
            return self.say(what)
        if not self.console.is_terminal:
            since = self._caching[1] if self._caching is not None and self._caching[0] == what else None
            if done == of or (since is not None and time.monotonic() - since > _EVERY_S):
                self.say(f"{what}: {done}/{of}")
            if since is None or time.monotonic() - since > _EVERY_S:
                self._caching = (what, time.monotonic())
            return
        if self._caching is None or self._caching[0] != what:
            self._close()
            self._open(what, of)
            self._caching = (what, 0.0)
        assert self._bar is not None and self._task is not None
        self._bar.update(self._task, completed=done)
        if done == of:
            self._close()
            self._caching = None

    @contextmanager
    def training(self, step: int, total: int) -> Iterator[None]:
        """Shows a bar of steps inside."""
        if self._speaks and self.console.is_terminal:
            self._open("step", total, TextColumn("{task.fields[told]}"), completed=step)
        try:
            yield
        finally:
            self._close()

    def advance(self, step: int) -> None:
        """The number of steps done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def steps(self, records: Sequence[dict[str, Any]], total: int) -> None:
        """What the last steps gave, their means; `records` of `StepMetrics.flush`."""
        if not records or not self._speaks:
            return
        text = told(records, total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, told=text, completed=records[-1]["step"])
        else:
            self.say(f"step {records[-1]['step']}/{total}  {text}")

    def _open(self, what: str, total: int, *more: TextColumn, completed: int = 0) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, *more, console=self.console)
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, completed=completed, told="")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None


@contextmanager
def say_log_of_twinflow(display: Display) -> Iterator[None]:
    """The display says what twinflow logs inside (INFO and above)."""
    logger, handler = logging.getLogger("twinflow"), logging.Handler()
    handler.emit = lambda record: display.say(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def told(records: Sequence[dict[str, Any]], total: int) -> str:
    """Mean loss, terms, time per step, peak memory and time left, on one line."""
    last, count = records[-1], len(records)
    names = dict.fromkeys(name for record in records for name in record["terms"])
    parts = [f"loss {sum(r['loss'] for r in records) / count:.4g}"]
    parts += [f"{name} {sum(r['terms'].get(name, 0.0) for r in records) / count:.3g}" for name in names]
    seconds = sum(r["s_per_step"] for r in records) / count
    parts.append(f"{seconds:.3g} s/step")
    if last["peak_gb"] is not None:
        parts.append(f"{last['peak_gb']:.1f} GB")
    return "  ".join([*parts, f"{clock((total - last['step']) * seconds)} left"])


def plural_steps(steps: int) -> str:
    """A number of steps, in words."""
    return f"{steps} step{'s' * (steps != 1)}"


def clock(seconds: float) -> str:
    """A duration as 1:02:03, hours left out where there are none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
