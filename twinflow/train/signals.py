"""`StopRequest`: Ctrl-C and SIGTERM as a wish to stop between two steps; `terminable()`: SIGTERM as Ctrl-C."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_INTERRUPTS = signal.default_int_handler
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM interrupts at once inside, as Ctrl-C does: for what goes on by itself when it is begun again."""
    before = signal.signal(signal.SIGTERM, _INTERRUPTS)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """Notes the first signal; the second one of Ctrl-C interrupts at once, as without it.

    A context manager; handlers are the process's own, so it must be entered in the main thread.

    Attributes:
        signal: name of what came, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
