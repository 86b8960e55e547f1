"""Triton kernels and launchers of `velocity_loss`: residual and partial sums, one program per row, gradient."""

import torch

from twinflow_kernels._triton import tl, triton

Tensor = torch.Tensor


def launch_config(row_size: int) -> tuple[int, int]:
    """(block, num_warps) of the elementwise kernels for rows of `row_size`; grid = (rows, blocks per row)."""
    return min(1024, max(128, triton.next_power_of_2(row_size))), 4


@triton.jit
def _residual_kernel(
    v_pred_ptr, v_target_ptr, x_start_ptr, x_end_ptr, rows_ptr, partials_ptr, residual_ptr, row_size,
    HAS_TARGET: tl.constexpr, HAS_PATH: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    mask = columns < row_size
    offsets = row * row_size + columns
    dtype = partials_ptr.dtype.element_ty
    # broadcast first: the interpreter gives a scalar's comparison the type of its operands
    zero = tl.zeros([BLOCK], dtype)
    a = tl.load(rows_ptr + row * 4).to(dtype) + zero
    b = tl.load(rows_ptr + row * 4 + 1).to(dtype) + zero
    clamp = tl.load(rows_ptr + row * 4 + 2).to(dtype) + zero
    active = mask & (tl.load(rows_ptr + row * 4 + 3).to(dtype) + zero != 0)
    # residual = where(a == 0, 0, a * v_pred)
    residual = a * tl.load(v_pred_ptr + offsets, mask=active & (a != 0), other=0.0).to(dtype)
    if HAS_PATH:
        # residual - where(b == 0, 0, b * (x_start - x_end))
        read = active & (b != 0)
        x_start = tl.load(x_start_ptr + offsets, mask=read, other=0.0).to(dtype)
        x_end = tl.load(x_end_ptr + offsets, mask=read, other=0.0).to(dtype)
        residual = residual - b * (x_start - x_end)
    if HAS_TARGET:
        residual = residual - tl.load(v_target_ptr + offsets, mask=active, other=0.0).to(dtype)
    # where(weight == 0, 0, residual.clamp(-clamp, clamp)); a NaN clamp makes the row NaN
    residual = tl.where(residual > clamp, clamp, tl.where(residual < -clamp, -clamp, residual))
    residual = tl.where(active, tl.where(clamp == clamp, residual, clamp), 0.0)
    if KEEP:
        tl.store(residual_ptr + offsets, residual, mask=mask)
    tl.store(partials_ptr + row * tl.num_programs(1) + block, tl.sum(residual * residual, axis=0))


@triton.jit
def _row_loss_kernel(
    partials_ptr, rows_ptr, loss_ptr, factor_ptr, blocks, row_size,
    ALPHA: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, blocks, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        sums += tl.load(partials_ptr + row * blocks + columns, mask=columns < blocks, other=0.0).to(tl.float64)
    # float64 for the one number per row: mse / c^2 spans many octaves, which a float32 power would lose
    mse = tl.sum(sums, axis=0) / row_size
    w = mse * 0 + 1
    if ALPHA - 2 >= 1e-5 or ALPHA - 2 <= -1e-5:
        SHAPE: tl.constexpr = ALPHA - 2 if ALPHA > 2 else 2 - ALPHA
        # (mse / (c^2 + 1e-8) / |alpha - 2| + 1)^((alpha - 2) / 2)
        w = tl.exp2(tl.log2(mse / (C * C + 1e-8) / SHAPE + 1) * ((ALPHA - 2) / 2))
    weight = tl.load(rows_ptr + row * 4 + 3).to(tl.float64)
    tl.store(loss_ptr + row, (weight * mse * w / C).to(loss_ptr.dtype.element_ty))
    tl.store(factor_ptr + row, (weight * w / C * 2 / row_size).to(factor_ptr.dtype.element_ty))


@triton.jit
def _gradient_kernel(grad_ptr, factor_ptr, residual_ptr, dv_ptr, row_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < row_size
    residual = tl.load(residual_ptr + row * row_size + columns, mask=mask)
    factor = tl.load(factor_ptr + row) + tl.zeros([BLOCK], residual.dtype)
    # where(factor == 0, 0, grad_loss * factor) * residual
    scale = tl.where(factor == 0, 0.0, tl.load(grad_ptr + row) * factor)
    dv = scale * residual
    if dv_ptr.dtype.element_ty != tl.float64:
        dv = dv.to(tl.float32)  # float64 reaches the 16-bit types by way of float32, as in torch
    tl.store(dv_ptr + row * row_size + columns, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def forward_triton(v_pred, v_target, x_start, x_end, rows, alpha, c, outputs) -> None:
    """Fills outputs = (loss, factor, residual); an empty residual is not wanted. Two launches."""
    loss, factor, residual = outputs
    row_count, row_size = v_pred.shape[0], v_pred[0].numel()
    block, num_warps = launch_config(row_size)
    blocks = triton.cdiv(row_size, block)
    v, rows = v_pred.contiguous(), rows.contiguous()
    target, start, end = (v if x is None else x.contiguous() for x in (v_target, x_start, x_end))
    partials = torch.empty(row_count, blocks, dtype=loss.dtype, device=v.device)
    _residual_kernel[(row_count, blocks)](
        v, target, start, end, rows, partials, residual, row_size, HAS_TARGET=v_target is not None,
        HAS_PATH=x_start is not None, KEEP=residual.numel() > 0, BLOCK=block, num_warps=num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    _row_loss_kernel[(row_count,)](
        partials, rows, loss, factor, blocks, row_size, ALPHA=alpha, C=c,
        BLOCK=min(1024, triton.next_power_of_2(blocks)), enable_fp_fusion=False,
    )  # fmt: skip


def backward_triton(grad_loss: Tensor, factor: Tensor, residual: Tensor, dv: Tensor) -> None:
    """Fills dv; one launch."""
    row_count, row_size = residual.shape[0], residual[0].numel()
    block, num_warps = launch_config(row_size)
    _gradient_kernel[(row_count, triton.cdiv(row_size, block))](
        grad_loss.contiguous(), factor, residual, dv, row_size, BLOCK=block, num_warps=num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
