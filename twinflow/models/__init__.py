"""Diffusers models as students: `load()` and one file per family.

Adding a family is one file and one line: docs/models.md lists the steps, base.py documents every attribute and method,
and tests/models/test_toy_family.py does all of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinflow.models.base import FlowModel
    from twinflow.models.loading import load
    from twinflow.models.registry import FAMILIES, register

__all__ = ["FAMILIES", "FlowModel", "load", "register"]

_HOMES = {"FAMILIES": "registry", "FlowModel": "base", "load": "loading", "register": "registry"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
