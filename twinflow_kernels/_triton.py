"""Triton, or what stands for it where it does not import: the other backends must do without it.

Kernel modules say `from twinflow_kernels._triton import tl, triton`. `_backend.py` never chooses Triton where
`MISSING` is set.
"""

from typing import Any

MISSING: str | None = None  # why Triton cannot be used


class _Absent:
    """Takes any attribute and call, as kernels' decorators and annotations need when their module is imported."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Absent":
        return self


try:
    import triton
    import triton.language as tl
except ImportError as error:
    MISSING = f"triton does not import: {error}"
    triton = tl = _Absent()
