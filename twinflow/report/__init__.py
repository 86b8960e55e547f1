"""One page about a run: its settings, its measurements, its samples."""

from twinflow.report.page import write_report

__all__ = ["write_report"]
