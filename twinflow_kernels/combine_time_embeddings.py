"""`combine_time_embeddings`: the embeddings of t and r and the sign row as one embedding, with autograd to all three.

    out = emb_t + emb_r (t - r) + sign_table[t < 0]      (docs/method.md, equations 29 and 30)

With a sign table the factor is |t| - |r|. Shapes: emb_t, emb_r, out (B, D); sign_table (2, D), row 0 for t >= 0; t, r
(B,) float32 or float64, unitless. The second term is exactly zero at r = t, so that a network which knew one time
starts unchanged.

Bytes moved: forward 3 B D elements, backward 2 B D. Ladder: v1 = eager, 6 launches forward and 7 backward; v2 = one
launch each way. The backward adds the table's gradient in the order of the rows: the same bits every time.
"""

from typing import Any

import torch

from twinflow_kernels._registry import register
from twinflow_kernels._triton import tl, triton


def combine_time_embeddings_ref(
    emb_t: torch.Tensor,
    emb_r: torch.Tensor | None,
    t: torch.Tensor,
    r: torch.Tensor | None,
    sign_table: torch.Tensor | None,
) -> torch.Tensor:
    """emb_t + emb_r (t - r) + sign_table[t < 0] in plain PyTorch, (B, D) in emb_t's dtype; None leaves a term out."""
    dtype = torch.promote_types(emb_t.dtype, torch.float32)
    out = emb_t.to(dtype)
    if emb_r is not None:
        out = out + emb_r.to(dtype) * _difference(t, r, sign_table is not None).to(dtype)[:, None]
    if sign_table is not None:
        out = out + sign_table.to(dtype)[(t < 0).long()]
    return out.to(emb_t.dtype, copy=True)


def combine_time_embeddings_backward_ref(
    dout: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor | None,
    absolute: bool,
    emb_r_dtype: torch.dtype | None,
    table_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients (B, D) of emb_r and (2, D) of sign_table in plain PyTorch; a dtype of None leaves one empty.

    The table's rows are summed row after row, in the kernel's order.
    """
    demb_r, dtable = _backward_fake(dout, t, r, absolute, emb_r_dtype, table_dtype)
    wide = dout.to(torch.promote_types(dout.dtype, torch.float32))
    if emb_r_dtype is not None:
        demb_r.copy_(wide * _difference(t, r, absolute).to(wide.dtype)[:, None])
    if table_dtype is not None:
        total = wide.new_zeros(dtable.shape)
        chosen = torch.stack([~(t < 0), t < 0])[..., None]
        for row in range(dout.shape[0]):
            total += torch.where(chosen[:, row], wide[row], 0.0)
        dtable.copy_(total)
    return demb_r, dtable


def _difference(t: torch.Tensor, r: torch.Tensor | None, absolute: bool) -> torch.Tensor:
    assert r is not None
    return t.abs() - r.abs() if absolute else t - r


def launch_config(width: int) -> tuple[int, int]:
    """(block, num_warps) of both kernels for rows of `width` elements; grid = (rows, blocks per row)."""
    block = min(512, max(64, triton.next_power_of_2(width)))
    return block, max(1, block // 128)


@triton.jit
def _difference_of(t_ptr, r_ptr, row, ABSOLUTE: tl.constexpr):
    t = tl.load(t_ptr + row)
    r = tl.load(r_ptr + row)
    return tl.abs(t) - tl.abs(r) if ABSOLUTE else t - r


@triton.jit
def _combine_kernel(
    emb_t_ptr, emb_r_ptr, t_ptr, r_ptr, table_ptr, out_ptr, width,
    HAS_R: tl.constexpr, HAS_TABLE: tl.constexpr, MATH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    offsets = row * width + column
    out = tl.load(emb_t_ptr + offsets, mask=mask).to(MATH)
    if HAS_R:
        # out + emb_r * difference
        difference = _difference_of(t_ptr, r_ptr, row, HAS_TABLE).to(MATH)
        out += tl.load(emb_r_ptr + offsets, mask=mask).to(MATH) * difference
    if HAS_TABLE:
        # out + sign_table[t < 0]
        table_row = (tl.load(t_ptr + row) < 0).to(tl.int64)
        out += tl.load(table_ptr + table_row * width + column, mask=mask).to(MATH)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_backward_kernel(
    dout_ptr, t_ptr, r_ptr, demb_r_ptr, dtable_ptr, rows, rows_per_program, width,
    HAS_R: tl.constexpr, HAS_TABLE: tl.constexpr, ABSOLUTE: tl.constexpr, MATH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    positive = tl.zeros([BLOCK], MATH)
    negative = tl.zeros([BLOCK], MATH)
    for row in range(first, tl.minimum(first + rows_per_program, rows)):
        dout = tl.load(dout_ptr + row * width + column, mask=mask, other=0.0).to(MATH)
        if HAS_R:
            # demb_r = dout * difference
            difference = _difference_of(t_ptr, r_ptr, row, ABSOLUTE).to(MATH)
            demb_r = (dout * difference).to(demb_r_ptr.dtype.element_ty)
            tl.store(demb_r_ptr + row * width + column, demb_r, mask=mask)
        if HAS_TABLE:
            # total[t < 0] += dout[row]
            is_negative = tl.load(t_ptr + row) < 0
            positive += tl.where(is_negative, 0.0, dout)
            negative += tl.where(is_negative, dout, 0.0)
    if HAS_TABLE:
        dtype = dtable_ptr.dtype.element_ty
        tl.store(dtable_ptr + column, positive.to(dtype), mask=mask)
        tl.store(dtable_ptr + width + column, negative.to(dtype), mask=mask)


def _math(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _combine_triton(
    emb_t: torch.Tensor,
    emb_r: torch.Tensor | None,
    t: torch.Tensor,
    r: torch.Tensor | None,
    sign_table: torch.Tensor | None,
) -> torch.Tensor:
    emb_t, t = emb_t.contiguous(), t.contiguous()
    out = torch.empty_like(emb_t)
    rows, width = emb_t.shape
    if out.numel() == 0:
        return out
    block, num_warps = launch_config(width)
    # A pointer that stands for None is never read.
    _combine_kernel[(rows, triton.cdiv(width, block))](
        emb_t, emb_t if emb_r is None else emb_r.contiguous(), t, t if r is None else r.contiguous(),
        emb_t if sign_table is None else sign_table.contiguous(), out, width, HAS_R=emb_r is not None,
        HAS_TABLE=sign_table is not None, MATH=_math(emb_t.dtype), BLOCK=block, num_warps=num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _backward_triton(
    dout: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor | None,
    absolute: bool,
    emb_r_dtype: torch.dtype | None,
    table_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dout, t = dout.contiguous(), t.contiguous()
    demb_r, dtable = _backward_fake(dout, t, r, absolute, emb_r_dtype, table_dtype)
    rows, width = dout.shape
    if dout.numel() == 0:
        return demb_r, dtable.zero_()
    block, num_warps = launch_config(width)
    # The sum over rows stays in one program; without it every row has its own.
    rows_per_program = 1 if table_dtype is None else rows
    _combine_backward_kernel[(triton.cdiv(rows, rows_per_program), triton.cdiv(width, block))](
        dout, t, t if r is None else r.contiguous(), demb_r, dtable, rows, rows_per_program, width,
        HAS_R=emb_r_dtype is not None, HAS_TABLE=table_dtype is not None, ABSOLUTE=absolute,
        MATH=_math(dout.dtype), BLOCK=block, num_warps=num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return demb_r, dtable


def _fake(
    emb_t: torch.Tensor,
    emb_r: torch.Tensor | None,
    t: torch.Tensor,
    r: torch.Tensor | None,
    sign_table: torch.Tensor | None,
) -> torch.Tensor:
    return torch.empty_like(emb_t, memory_format=torch.contiguous_format)


def _backward_fake(
    dout: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor | None,
    absolute: bool,
    emb_r_dtype: torch.dtype | None,
    table_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    demb_r = dout.new_empty((0,) if emb_r_dtype is None else dout.shape, dtype=emb_r_dtype)
    dtable = dout.new_empty((0,) if table_dtype is None else (2, dout.shape[1]), dtype=table_dtype)
    return demb_r, dtable


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, emb_r, t, r, sign_table = inputs
    needs_r = emb_r is not None and ctx.needs_input_grad[1]
    needs_table = sign_table is not None and ctx.needs_input_grad[4]
    ctx.absolute = sign_table is not None
    ctx.dtypes = (emb_r.dtype if needs_r else None, sign_table.dtype if needs_table else None)
    ctx.has_r = needs_r
    ctx.save_for_backward(*([t] if needs_r or needs_table else []), *([r] if needs_r else []))


def _backward(ctx: Any, dout: torch.Tensor) -> tuple:
    demb_r = dtable = None
    emb_r_dtype, table_dtype = ctx.dtypes
    if emb_r_dtype is not None or table_dtype is not None:
        t, *rest = ctx.saved_tensors
        demb_r, dtable = torch.ops.twinflow.combine_time_embeddings_backward(
            dout, t, rest[0] if rest else None, ctx.absolute, emb_r_dtype, table_dtype
        )
    demb_t = dout if ctx.needs_input_grad[0] else None
    return demb_t, demb_r if emb_r_dtype is not None else None, None, None, dtable if table_dtype is not None else None


_backward_operation = register(
    "combine_time_embeddings_backward(Tensor dout, Tensor t, Tensor? r, bool absolute, ScalarType? emb_r_dtype, "
    "ScalarType? table_dtype) -> (Tensor, Tensor)",
    reference=combine_time_embeddings_backward_ref,
    triton=_backward_triton,
    fake=_backward_fake,
)
_operation = register(
    "combine_time_embeddings(Tensor emb_t, Tensor? emb_r, Tensor t, Tensor? r, Tensor? sign_table) -> Tensor",
    reference=combine_time_embeddings_ref,
    triton=_combine_triton,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
