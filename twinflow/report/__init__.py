"""One page about a run: what it was asked for, how it went, what it draws."""

from twinflow.report.page import write_report

__all__ = ["write_report"]
