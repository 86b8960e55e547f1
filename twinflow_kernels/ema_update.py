"""`ema_update_`: the exponential moving average of a whole model's tensors, in place, in one pass.

    new = decay target + (1 - decay) source        (docs/method.md, equation 7)

Shapes: targets and sources are lists of equally shaped tensors; decay in [0, 1] is unitless. Arithmetic in float32
(float64 for float64 targets). Source: Polyak averaging as used for the teacher of TwinFlow (arXiv 2512.05150).

Bytes moved per parameter: target read and written, source read: 12 for float32, 10 for a bf16 source; a copy adds its
own size.
"""

from collections.abc import Sequence

import numpy as np
import torch

from twinflow_kernels import _backend, _registry
from twinflow_kernels._registry import register, require, require_floating

WHERE = "ema_update_"


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


def _spans(tensors: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """First address and address past the end of each tensor, both 0 where it is empty."""
    begin = np.fromiter(map(torch.Tensor.data_ptr, tensors), np.int64, len(tensors))
    size = np.fromiter(map(torch.Tensor.numel, tensors), np.int64, len(tensors))
    if not all(map(torch.Tensor.is_contiguous, tensors)):
        for i, x in enumerate(tensors):
            if size[i] and not x.is_contiguous():
                size[i] = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    size *= np.fromiter(map(torch.Tensor.element_size, tensors), np.int64, len(tensors))
    begin[size == 0] = 0
    return begin, begin + size


def _check_memory(written: Sequence[torch.Tensor], read: Sequence[torch.Tensor]) -> None:
    """Raises ValueError where a written tensor shares memory with another written or a read one; O(n log n)."""
    begin, end = _spans([*written, *read])
    order = np.argsort(begin, kind="stable")
    begin, end, is_written = begin[order], end[order], order < len(written)
    # Of the ranges that begin earlier, the furthest end of any, and of a written one.
    any_end = np.maximum.accumulate(end)[:-1]
    written_end = np.maximum.accumulate(np.where(is_written, end, 0))[:-1]
    clash = begin[1:] < np.where(is_written[1:], any_end, written_end)
    require(
        not clash.any(), WHERE, "targets and copies", "memory of their own", "an overlap among them or with a source"
    )


def _host_decay(decay: float, decay_tensor: torch.Tensor | None) -> float:
    """The decay as a number; a decay tensor that lies on the host is read and checked here."""
    if decay_tensor is not None:
        decay = float(decay_tensor)
        require(0.0 <= decay <= 1.0, WHERE, "decay", "in [0, 1]", decay)
    return decay


_PAIR = np.dtype([("address", np.int64, 3), ("count", np.int64), ("dtype", np.int16, 4)])  # csrc/kernels.h: EmaPair


def _table(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]
) -> np.ndarray:
    """One row per pair; the first len(copies) pairs have a copy."""
    table = np.zeros(len(targets), _PAIR)
    code, dtype_of = _registry.DTYPE_CODES.__getitem__, torch.Tensor.dtype.__get__
    for column, tensors in enumerate((targets, sources, copies)):
        n = len(tensors)
        table["address"][:n, column] = np.fromiter(map(torch.Tensor.data_ptr, tensors), np.int64, n)
        table["dtype"][:n, column] = np.fromiter(map(code, map(dtype_of, tensors)), np.int16, n)
    table["count"] = np.fromiter(map(torch.Tensor.numel, targets), np.int64, len(targets))
    return table


def _ema_update_cpu(targets, sources, decay, decay_tensor, copies) -> None:
    decay = _host_decay(decay, decay_tensor)
    _check_memory([*targets, *copies], sources)
    sources = [x.contiguous() for x in sources]
    table = _table(targets, sources, copies)
    _backend.native().ema_update_cpu(  # type: ignore[union-attr]
        table.ctypes.data, len(table), decay, _registry.native_threads()
    )


def _ema_update_reference(targets, sources, decay, decay_tensor, copies) -> None:
    if decay_tensor is not None and decay_tensor.device.type == "cpu":
        decay, decay_tensor = _host_decay(decay, decay_tensor), None
    _check_memory([*targets, *copies], sources)
    for target, source in zip(targets, sources, strict=True):
        target.copy_(ema_update_ref(target, source, decay if decay_tensor is None else decay_tensor))
    for copy, target in zip(copies, targets, strict=False):
        copy.copy_(target)


def _fake(targets, sources, decay, decay_tensor, copies) -> None:
    return None


_operation = register(
    # Copies belong to the first len(copies) targets.
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float decay, Tensor? decay_tensor, Tensor(b!)[] copies) -> ()",
    reference=_ema_update_reference,
    cpu=_ema_update_cpu,
    fake=_fake,
)


def _check_list(
    name: str, tensors: Sequence[torch.Tensor | None], targets: Sequence[torch.Tensor], written: bool
) -> None:
    """Raises for the first tensor that does not fit its target."""
    require(len(tensors) == len(targets), WHERE, name, f"as long as targets, {len(targets)}", len(tensors))
    for i, (x, target) in enumerate(zip(tensors, targets, strict=True)):
        if x is None and name == "copies":
            continue
        here = f"{name}[{i}]"
        require_floating(WHERE, here, x)
        require(x.shape == target.shape, WHERE, here, f"of targets[{i}]'s shape {tuple(target.shape)}", tuple(x.shape))
        require(x.device == targets[0].device, WHERE, here, f"on targets[0]'s device {targets[0].device}", x.device)
        if written:
            require(x.is_contiguous(), WHERE, here, "contiguous, as it is written", f"strides {x.stride()}")
            require(not x.requires_grad, WHERE, here, "a tensor without requires_grad", "requires_grad=True")


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
    for i, target in enumerate(targets):
        require_floating(WHERE, f"targets[{i}]", target)
    decay, decay_tensor = _split_decay(decay, targets)
    _check_list("targets", targets, targets, written=True)
    _check_list("sources", sources, targets, written=False)
    kept: list[torch.Tensor] = []
    if copies is not None:
        _check_list("copies", copies, targets, written=True)
        order = sorted(range(len(targets)), key=lambda i: copies[i] is None)
        kept = [copies[i] for i in order if copies[i] is not None]
        targets, sources = [targets[i] for i in order], [sources[i] for i in order]
    if targets:
        torch.ops.twinflow.ema_update_(targets, sources, decay, decay_tensor, kept)
