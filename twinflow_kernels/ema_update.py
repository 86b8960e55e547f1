"""`ema_update_`: the exponential moving average of a whole model's tensors, in place, in one pass.

    new = decay target + (1 - decay) source        (docs/method.md, equation 7)

Shapes: targets and sources are lists of equally shaped tensors; decay in [0, 1] is unitless. Arithmetic in float32
(float64 for float64 targets). Source: Polyak averaging as used for the teacher of TwinFlow (arXiv 2512.05150).

Bytes moved per parameter: target read and written, source read: 12 for float32, 10 for a bf16 source; a copy adds its
own size.

Ladder, CPU (2 threads, 64 M parameters in one tensor, bf16 into float32; benchmarks/results/): v1 = the `mul_`/`add_`
pair, two passes and a cast, 104 ms; v2 = torch.compile, 13.2 ms; v3 = one C++ pass over a table of addresses, threads
sharing the elements and not the tensors, the source widened in tiles of 1,024, 13.1 ms: at the memory's speed, like
v2 and (equal dtypes) `_foreach_lerp_`. No gain: prefetching the next tile, tiles of 256 or 4,096, no tiles. Pieces
handed out as threads come free: equal on a quiet machine, faster on a busy one. 2,000 tensors of 4,096: 5.6 ms,
`_foreach_lerp_` 6.2.
Ladder, CUDA (not timed: no GPU at hand; both are kept until one is, TWINFLOW_BACKEND picks): v1 = Triton over a table
on the device, one launch per combination of dtypes, tables cached by their contents; v2 (default) = CUDA C++, the table
by value in the kernel's parameters, dtypes per tensor at run time, 1,363 tensors a launch (1,022 with copies): nothing
is copied to the device and a CUDA graph needs no warm-up.
"""

from collections.abc import Sequence

import torch

from twinflow_kernels import _backend, _registry
from twinflow_kernels._ema_pairs import WHERE, Tensors, check_lists, prepare
from twinflow_kernels._registry import register, require, require_floating
from twinflow_kernels.ema_update_triton import launch_triton


def ema_update_ref(target: torch.Tensor, source: torch.Tensor, decay: float | torch.Tensor) -> torch.Tensor:
    """The new value of one pair in plain PyTorch, out of place.

    Args:
        target: any shape, any floating dtype.
        source: of target's shape, any floating dtype.
        decay: in [0, 1]; 0 gives the source and 1 the target, whatever the other holds.

    Returns:
        decay target + (1 - decay) source in target's dtype; arithmetic in float32 or wider.
    """
    dtype = torch.promote_types(target.dtype, torch.float32)
    keep = torch.as_tensor(decay, dtype=torch.float64, device=target.device).reshape(())
    old, new = target.to(dtype), source.to(dtype)
    mixed = keep.to(dtype) * old + (1 - keep).to(dtype) * new
    return torch.where(keep == 0, new, torch.where(keep == 1, old, mixed)).to(target.dtype)


def _read_decay(
    decay: float, decay_tensor: torch.Tensor | None, device: torch.device | None
) -> tuple[float, torch.Tensor | None]:
    """The decay as a number, or as a tensor where it lies on `device`, to be read by the kernel there."""
    if decay_tensor is None or decay_tensor.device == device:
        return decay, decay_tensor
    value = float(decay_tensor)
    require(0.0 <= value <= 1.0, WHERE, "decay", "in [0, 1]", value)
    return value, None


def _ema_update_triton(
    targets: Tensors, sources: Tensors, decay: float, decay_tensor: torch.Tensor | None, copies: Tensors
) -> None:
    decay, on_device = _read_decay(decay, decay_tensor, targets[0].device)
    table, sources = prepare(targets, sources, copies)
    launch_triton(table, decay, on_device, targets[0].device)


def _ema_update_cuda(
    targets: Tensors, sources: Tensors, decay: float, decay_tensor: torch.Tensor | None, copies: Tensors
) -> None:
    decay, on_device = _read_decay(decay, decay_tensor, targets[0].device)
    table, sources = prepare(targets, sources, copies)
    device = targets[0].device
    address, code = (0, 0) if on_device is None else (on_device.data_ptr(), _registry.dtype_code(on_device.dtype))
    _backend.native().ema_update_cuda(  # type: ignore[union-attr]
        table.ctypes.data, len(table), decay, address, code,
        device.index, torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip


def _ema_update_cpu(
    targets: Tensors, sources: Tensors, decay: float, decay_tensor: torch.Tensor | None, copies: Tensors
) -> None:
    decay, _ = _read_decay(decay, decay_tensor, None)
    table, sources = prepare(targets, sources, copies)
    _backend.native().ema_update_cpu(  # type: ignore[union-attr]
        table.ctypes.data, len(table), decay, _registry.native_threads()
    )


def _ema_update_reference(
    targets: Tensors, sources: Tensors, decay: float, decay_tensor: torch.Tensor | None, copies: Tensors
) -> None:
    device = None if targets[0].device.type == "cpu" else targets[0].device
    decay, on_device = _read_decay(decay, decay_tensor, device)
    prepare(targets, sources, copies)
    for target, source in zip(targets, sources, strict=True):
        target.copy_(ema_update_ref(target, source, decay if on_device is None else on_device))
    for copy, target in zip(copies, targets, strict=False):
        copy.copy_(target)


def _fake(targets: Tensors, sources: Tensors, decay: float, decay_tensor: torch.Tensor | None, copies: Tensors) -> None:
    check_lists(targets, sources, [*copies, *[None] * (len(targets) - len(copies))])


_operation = register(
    # Copies belong to the first len(copies) targets.
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float decay, Tensor? decay_tensor, Tensor(b!)[] copies) -> ()",
    reference=_ema_update_reference,
    cpu=_ema_update_cpu,
    triton=_ema_update_triton,
    cuda=_ema_update_cuda,
    fake=_fake,
)


def _split_decay(decay: float | torch.Tensor, targets: Sequence[torch.Tensor]) -> tuple[float, torch.Tensor | None]:
    """The checked decay as a number, or as a tensor whose value the operation reads."""
    if isinstance(decay, torch.Tensor):
        require_floating(WHERE, "decay", decay)
        require(decay.numel() == 1, WHERE, "decay", "a tensor of one element", f"shape {tuple(decay.shape)}")
        devices = [torch.device("cpu"), *(x.device for x in targets[:1])]
        require(
            decay.device in devices, WHERE, "decay", f"on the CPU or on targets[0]'s device {devices[-1]}", decay.device
        )
        return 0.0, decay
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise TypeError(f"{WHERE}: decay must be a number or a tensor of one element, got {type(decay).__name__}")
    require(0.0 <= decay <= 1.0, WHERE, "decay", "in [0, 1]", decay)
    return float(decay), None


def _any_requires_grad(targets: Tensors, copies: Tensors) -> bool:
    """Also where an element is no tensor."""
    return any(getattr(x, "requires_grad", True) for tensors in (targets, copies) for x in tensors)


def ema_update_(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    decay: float | torch.Tensor,
    copies: Sequence[torch.Tensor | None] | None = None,
) -> None:
    """Moves every target towards its source, targets[i] <- decay targets[i] + (1 - decay) sources[i]; no autograd.

    Args:
        targets: tensors of any shapes on one device, float32, float64, bfloat16 or float16, each pair free to
            differ in dtype from the others; contiguous; overwritten. A bfloat16 target loses small increments.
        sources: as many, each of its target's shape, any of the four dtypes; one that is strided is copied first.
        decay: in [0, 1]; a number, or a tensor of one element on the CPU or on the targets' device. A device's value
            is read there, without a host sync; outside [0, 1] it gives NaN. 0 copies the source exactly whatever the
            target held (an uninitialised one too), 1 leaves every bit of the targets.
        copies: None, or as many tensors or None: each receives its target's new value in its own dtype, in the same
            pass; contiguous.

    Raises:
        TypeError: an element is not a tensor of the four dtypes, or decay is neither a number nor such a tensor.
        ValueError: lengths, shapes or devices differ, decay is outside [0, 1], a target or copy is not contiguous,
            requires grad, or shares memory with another tensor of the call.

    Source: TwinFlow (arXiv 2512.05150); docs/method.md, equation 7.
    """
    targets, sources = list(targets), list(sources)
    shadows = [x for x in copies if x is not None] if copies is not None else []
    in_order = copies is None or len(shadows) == len(targets)
    tracing = torch.compiler.is_compiling()
    # The operation checks its tensors itself; this names the element where it or its dispatcher cannot.
    if tracing or not in_order or len(sources) != len(targets) or _any_requires_grad(targets, shadows):
        check_lists(targets, sources, copies)
    decay, decay_tensor = _split_decay(decay, targets)
    if not targets:
        return
    if not in_order:
        has_copy = [x is not None for x in copies or ()]
        order = sorted(range(len(targets)), key=lambda i: not has_copy[i])
        targets, sources = [targets[i] for i in order], [sources[i] for i in order]
    try:
        with torch.no_grad():
            _operation.call(targets, sources, decay, decay_tensor, shadows)
    except (RuntimeError, TypeError):
        check_lists(targets, sources, shadows or None)
        raise
    if not tracing:
        # As torch's own in-place operations do: a backward pass that has saved an old value then raises.
        torch.autograd.graph.increment_version([*targets, *shadows])
