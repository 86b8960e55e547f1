"""`velocity_loss`: the loss of every row of a batch, whatever the row's role, and its gradient with respect to v_pred.

    R = clamp(a v_pred - b (x_start - x_end) - v_target, -clamp, clamp)    (docs/method.md, equations 13-15 and 21)
    mse = mean(R^2) over the row                                           (equation 17)
    w = (mse / (c^2 + 1e-8) / |alpha - 2| + 1)^((alpha - 2) / 2)           (equation 18; w = 1 for alpha = 2)
    loss = weight mse w / c,    d loss / d v_pred = weight w / c 2 R / row_size;    l2 is alpha = 2, c = 1

The regression target is sg(F - R) (equation 14), so the gradient flows through v_pred with factor one whatever a is;
w is a constant of the gradient. Neither the target nor the error is materialised.

Shapes: v_pred, v_target, x_start, x_end (B, ...), each in its own floating dtype; rows (B, 4) holds a = scale_pred,
b = scale_path, clamp >= 0 (inf: none) and weight; losses (B,) in float32, float64 where an input is. All unitless.
Source: RCGM and rectify losses, TwinFlow (arXiv 2512.05150), section 2; robust loss, Barron (arXiv 1701.03077).

Ladder (CPU, (8, 16, 128, 128) float32, forward in one thread's time, shared machine): without gradient 1.5 ms; v1 =
gradient written while the row is in L2, 1.85; v2 = whole rows per thread, 1.85 with one barrier a call, not two a row.
Lost: R to a scratch row and streaming stores 1.95, prefetches past L2 2.1, inputs read twice instead of storing R 2.7.

Bytes moved per element, float32: forward 16 read and 4 written (R), backward 4 read and 4 written. On a CPU the forward
writes the gradient itself and the backward hands it out: no bytes, or 8 where grad_out is not 1.
"""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from twinflow_kernels import _backend, _registry
from twinflow_kernels._registry import constants_fit, dtype_code, register, require, require_floating, require_like
from twinflow_kernels._triton import tl, triton

WHERE = "velocity_loss"


def velocity_loss_ref(
    v_pred: Tensor,
    v_target: Tensor | None,
    x_start: Tensor | None,
    x_end: Tensor | None,
    rows: Tensor,
    alpha: float,
    c: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and what its gradient is made of, in plain PyTorch.

    Args:
        v_pred: the student's velocity, (B, ...), any floating dtype.
        v_target: subtracted, (B, ...), or None.
        x_start, x_end: ends of the rollout, (B, ...), or both None.
        rows: scale_pred, scale_path, clamp, weight per row, (B, 4).
        alpha, c: shape and scale of the Barron loss.

    Returns:
        loss (B,), factor (B,), residual (B, ...) in float32 or wider: factor * residual is d loss / d v_pred.
    """
    dtype = _dtype(v_pred, v_target, x_start, x_end)
    a, b, clamp, weight = (column.view(-1, *[1] * (v_pred.dim() - 1)) for column in rows.to(dtype).unbind(1))
    residual = torch.where(a == 0, 0.0, a * v_pred.to(dtype))
    if x_start is not None and x_end is not None:
        residual = residual - torch.where(b == 0, 0.0, b * (x_start.to(dtype) - x_end.to(dtype)))
    if v_target is not None:
        residual = residual - v_target.to(dtype)
    residual = torch.where(weight == 0, 0.0, residual.clamp(-clamp, clamp))
    mse = residual.flatten(1).square().mean(1) if residual.dim() > 1 else residual.square()
    shape = abs(alpha - 2)
    w = (mse / (c**2 + 1e-8) / shape + 1) ** ((alpha - 2) / 2) if shape >= 1e-5 else torch.ones_like(mse)
    weight = weight.reshape(-1)
    return weight * mse * w / c, weight * w / c * 2 / _row_size(v_pred), residual


def velocity_loss_backward_ref(grad_loss: Tensor, factor: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of v_pred: grad_loss * factor * residual, rounded once; rows with factor 0 give 0."""
    scale = torch.where(factor == 0, 0.0, grad_loss * factor)
    return (scale.view(-1, *[1] * (residual.dim() - 1)) * residual).to(dtype, copy=True)


def _dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def _row_size(x: Tensor) -> int:
    return x.numel() // x.shape[0] if x.shape[0] else 0


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


def _outputs(v_pred, v_target, x_start, x_end, rows, alpha, c, keep) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised loss (B,), factor (B,) and residual: of v_pred's shape, or (0,) where it is not kept."""
    dtype = _dtype(v_pred, v_target, x_start, x_end)
    shapes = v_pred.shape[:1], v_pred.shape[:1], v_pred.shape if keep else (0,)
    return tuple(torch.empty(shape, dtype=dtype, device=v_pred.device) for shape in shapes)  # type: ignore


def _velocity_loss_triton(v_pred, v_target, x_start, x_end, rows, alpha, c, keep) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches; an empty residual is not written."""
    loss, factor, residual = _outputs(v_pred, v_target, x_start, x_end, rows, alpha, c, keep)
    if not v_pred.shape[0]:
        return loss, factor, residual
    row_count, row_size = v_pred.shape[0], _row_size(v_pred)
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
    return loss, factor, residual


def _backward_triton(grad_loss, factor, residual, dtype) -> Tensor:
    dv = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    if not dv.numel():
        return dv
    row_count, row_size = residual.shape[0], _row_size(residual)
    block, num_warps = launch_config(row_size)
    _gradient_kernel[(row_count, triton.cdiv(row_size, block))](
        grad_loss.contiguous(), factor, residual, dv, row_size, BLOCK=block, num_warps=num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return dv


def _velocity_loss_cpu(v_pred, v_target, x_start, x_end, rows, alpha, c, keep) -> tuple[Tensor, Tensor, Tensor]:
    """Here `residual` is the gradient already: scaled while in cache, factor 1, or 0 where weight is."""
    loss, factor, gradient = _outputs(v_pred, v_target, x_start, x_end, rows, alpha, c, keep)
    inputs = [None if x is None else x.contiguous() for x in (v_pred, v_target, x_start, x_end)]
    inputs.append(rows.to(loss.dtype).contiguous())
    if v_pred.shape[0]:
        _backend.native().velocity_loss_cpu(  # type: ignore[union-attr]
            [0 if x is None else x.data_ptr() for x in inputs],
            [loss.data_ptr(), factor.data_ptr(), gradient.data_ptr() if keep else 0],
            [0 if x is None else dtype_code(x.dtype) for x in inputs],
            v_pred.shape[0], _row_size(v_pred), alpha, c, _registry.native_threads(),
        )  # fmt: skip
    return loss, factor, gradient


def _backward_cpu(grad_loss, factor, residual, dtype, out: Tensor | None = None) -> Tensor:
    dv = torch.empty(residual.shape, dtype=dtype) if out is None else out
    if dv.numel():
        _backend.native().velocity_loss_backward_cpu(  # type: ignore[union-attr]
            grad_loss.data_ptr(), factor.data_ptr(), residual.data_ptr(), dv.data_ptr(), residual.shape[0],
            _row_size(residual), grad_loss.stride(0), dtype_code(residual.dtype), dtype_code(dtype),
            _registry.native_threads(),
        )  # fmt: skip
    return dv


def _reference(v_pred, v_target, x_start, x_end, rows, alpha, c, keep) -> tuple[Tensor, Tensor, Tensor]:
    *losses, residual = velocity_loss_ref(v_pred, v_target, x_start, x_end, rows, alpha, c)
    return *losses, residual if keep else residual.new_empty(0)  # type: ignore[return-value]


def _setup_context(ctx, inputs, output) -> None:
    _, factor, residual = output
    ctx.mark_non_differentiable(factor, residual)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(factor, residual)
    ctx.dtype = inputs[0].dtype


# Whether the running backward keeps its graph for another one; torch's own compiled backward asks the same.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _may_give_away(residual: Tensor, dtype: torch.dtype) -> bool:
    """Whether the saved gradient may become v_pred's own: no other pass will read it, and none is traced."""
    plain = type(residual) is Tensor and residual.is_cpu and residual.dtype == dtype and not is_in_torch_dispatch_mode()
    last = plain and not _keeps_graph() and not torch.is_grad_enabled()
    return last and _operation.choice("cpu").backend == "cpu"


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:  # nothing came to the loss
        return (None,) * 8
    factor, residual = ctx.saved_tensors
    if _may_give_away(residual, ctx.dtype):
        return _backward_cpu(grad_loss, factor, residual, ctx.dtype, out=residual), *(None,) * 7
    with torch.no_grad():
        dv = _backward_operation.call(grad_loss, factor, residual, ctx.dtype)
    if torch.is_grad_enabled():
        message = b"velocity_loss: has no second derivative, its target and its weight are constants"
        dv = torch._C._functions.DelayedError(message, 1)(dv.requires_grad_())
    return dv, *(None,) * 7


_operation = register(
    "velocity_loss(Tensor v_pred, Tensor? v_target, Tensor? x_start, Tensor? x_end, Tensor rows, float alpha, float c,"
    " bool keep) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    cpu=_velocity_loss_cpu,
    triton=_velocity_loss_triton,
    fake=_outputs,
    setup_context=_setup_context,
    backward=_backward,
)
_backward_operation = register(
    "velocity_loss_backward(Tensor grad_loss, Tensor factor, Tensor residual, ScalarType dtype) -> Tensor",
    reference=velocity_loss_backward_ref,
    cpu=_backward_cpu,
    triton=_backward_triton,
    fake=lambda grad_loss, factor, residual, dtype: torch.empty(residual.shape, dtype=dtype, device=residual.device),
)


def _fits(v_pred, v_target, x_start, x_end, rows, loss, alpha, c) -> bool:
    """Whether the arguments pass every check of `_check`."""
    if not isinstance(v_pred, Tensor) or not isinstance(rows, Tensor) or v_pred.dtype not in _registry.DTYPE_CODES:
        return False
    shape, device = v_pred.shape, v_pred.device
    if not constants_fit(shape, device, *(x for x in (v_target, x_start, x_end) if x is not None)):
        return False
    return (
        len(shape) >= 1 and 0 not in shape[1:] and (x_start is None) == (x_end is None)
        and rows.dtype in (torch.float32, torch.float64) and constants_fit((shape[0], 4), device, rows)
        and loss in ("barron", "l2")
        and -math.inf < alpha < math.inf and 0 < c < math.inf
    )  # fmt: skip


def _check(v_pred, v_target, x_start, x_end, rows, loss, alpha, c) -> None:
    if _fits(v_pred, v_target, x_start, x_end, rows, loss, alpha, c):
        return  # before any message is made: this is on the path of every call
    require_floating(WHERE, "v_pred", v_pred)
    shape = tuple(v_pred.shape)
    require(len(shape) >= 1 and 0 not in shape[1:], WHERE, "v_pred", "of shape (B, ...), rows not empty", shape)
    require((x_start is None) == (x_end is None), WHERE, "x_start and x_end", "both given or both None", "one of them")
    for name, value in (("v_target", v_target), ("x_start", x_start), ("x_end", x_end)):
        if value is not None:
            require_floating(WHERE, name, value)
            require_like(WHERE, name, value, "v_pred", v_pred)
    require_floating(WHERE, "rows", rows, (torch.float32, torch.float64))
    wanted = "of shape (B, 4), a row of coefficients for each of v_pred's rows"
    require(rows.shape == (shape[0], 4), WHERE, "rows", wanted, tuple(rows.shape))
    require(rows.device == v_pred.device, WHERE, "rows", "on v_pred's device", rows.device)
    if torch.is_grad_enabled():
        wanted = "a tensor without requires_grad, as the target is a constant"
        for name, value in (("v_target", v_target), ("x_start", x_start), ("x_end", x_end), ("rows", rows)):
            require(value is None or not value.requires_grad, WHERE, name, wanted, "requires_grad=True")
    require(loss in ("barron", "l2"), WHERE, "loss", "barron or l2", repr(loss))
    require(-math.inf < alpha < math.inf, WHERE, "alpha", "finite", alpha)
    require(0 < c < math.inf, WHERE, "c", "positive and finite", c)


def velocity_loss(
    v_pred: Tensor,
    v_target: Tensor | None,
    x_start: Tensor | None,
    x_end: Tensor | None,
    rows: Tensor,
    *,
    loss: str = "barron",
    alpha: float = 1.0,
    c: float = 1e-3,
) -> Tensor:
    """Computes the weighted loss of every row against the target sg(v_pred - R), without materialising the target.

    R = clamp(scale_pred v_pred - scale_path (x_start - x_end) - v_target, -clamp, clamp). Where scale_pred is 0, v_pred
    is not read; where scale_path is 0, x_start and x_end are not; where weight is 0 nothing is, and the row's loss and
    gradient are exactly 0. The gradient flows to v_pred only, with factor one; there is no second derivative.

    Args:
        v_pred: the student's velocity, (B, ...), float32, float64, bfloat16 or float16.
        v_target: target velocity, (B, ...), any of these dtypes, or None for 0.
        x_start, x_end: ends of the teacher's rollout, (B, ...), any of these dtypes, or both None: no such term.
        rows: scale_pred, scale_path, clamp >= 0 (inf: none) and weight per row, (B, 4), float32 or float64; used in the
            dtype of the result.
        loss: "barron" or "l2" (mse alone; alpha and c are not used).
        alpha, c: shape and scale of the Barron loss.

    Returns:
        Losses, (B,), float32 (float64 where v_pred, v_target, x_start or x_end is).

    Raises:
        TypeError: an argument is not a floating tensor of an allowed dtype.
        ValueError: shapes or devices differ, rows are empty, a constant requires grad, or an option is not allowed.

    Source: TwinFlow (arXiv 2512.05150), section 2; docs/method.md, equations 13-18, 21 and 22.
    """
    _check(v_pred, v_target, x_start, x_end, rows, loss, alpha, c)
    keep = v_pred.requires_grad and torch.is_grad_enabled()
    alpha, c = (float(alpha), float(c)) if loss == "barron" else (2.0, 1.0)
    arguments = v_pred, v_target, x_start, x_end, rows, alpha, c, keep
    return (_operation.differentiable(*arguments) if keep else _operation.call(*arguments))[0]
