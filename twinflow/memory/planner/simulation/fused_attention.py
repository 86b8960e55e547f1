"""`fused_attention()`: attention as a GPU runs it, on the meta device; `workspace()`: what kernels hold inside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

import twinflow.memory.quantised_linear  # noqa: F401 - its operation

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
_FLASH_BACKWARD = _aten._scaled_dot_product_flash_attention_backward.default
_EFFICIENT_BACKWARD = _aten._scaled_dot_product_efficient_attention_backward.default
_DEQUANTISE = torch.ops.twinflow.dequantise.default
FLASH_ROWS = 128  # rows of queries that flash attention's backward rounds up to


@contextmanager
def fused_attention() -> Iterator[None]:
    """Sends `scaled_dot_product_attention` to the kernel that CUDA would choose.

    Flash attention where there is no mask and the dtype is of half precision, or else memory-efficient attention:
    neither makes the matrix of scores. On the meta device torch itself would choose the kernel that does. The function
    is replaced, as torch's function modes are off while a backward pass recomputes.
    """
    with replaced(F, "scaled_dot_product_attention", lambda original: _fused):
        yield


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replaces an attribute by what `make` gives for it, and puts it back as it was."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is None and query.dtype in _HALF:
        return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
    wants = torch.is_grad_enabled()
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, wants, dropout_p, is_causal, scale=scale
    )[0]


def workspace(func: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """Bytes that a CUDA kernel allocates inside itself while it runs.

    They are the float32 sums of attention's backward, and nf4's scales in float32, one per 64 values.
    """
    if func is _DEQUANTISE and args[2] == "nf4":
        return 4 * result.numel() // 64
    if func not in (_FLASH_BACKWARD, _EFFICIENT_BACKWARD):
        return 0
    query = args[1]
    batch, heads, rows, width = query.shape
    rounded = -(-rows // FLASH_ROWS) * FLASH_ROWS
    sums = batch * heads * rounded * -(-width // 32) * 32 * 4  # of the queries' gradient
    return sums + batch * heads * rounded * 4  # and per row of queries
