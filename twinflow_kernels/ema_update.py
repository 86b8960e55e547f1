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
from functools import cache, lru_cache

import numpy as np
import torch

from twinflow_kernels import _backend, _registry
from twinflow_kernels._registry import register, require, require_floating
from twinflow_kernels._triton import tl, triton

WHERE = "ema_update_"
Tensors = Sequence[torch.Tensor]
# csrc/kernels.h: EmaPair
PAIR = np.dtype([("address", np.int64, 3), ("count", np.int64), ("dtype", np.int16, 4)])


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
    keep = torch.as_tensor(decay, dtype=_backend.widest(target.device), device=target.device).reshape(())
    old, new = target.to(dtype), source.to(dtype)
    mixed = keep.to(dtype) * old + (1 - keep).to(dtype) * new
    return torch.where(keep == 0, new, torch.where(keep == 1, old, mixed)).to(target.dtype)


def launch_config(count: int, aligned: bool) -> tuple[int, int, int]:
    """(chunk, block, num_warps) of the Triton kernel for tensors of up to `count` elements; grid = (chunks,).

    A program walks one chunk of a tensor, `block` elements at a time.
    """
    block = min(2048 if aligned else 512, max(128, triton.next_power_of_2(count)))
    return min(16384, max(block, triton.next_power_of_2(count))), block, 8


@triton.jit
def _update_columns(target, source, copy, columns, mask, keep, HAS_COPY: tl.constexpr):
    replace, stay = keep == 0, keep == 1
    old = tl.load(target + columns, mask=mask & (not replace), other=0.0)
    new = tl.load(source + columns, mask=mask & (not stay), other=0.0)
    wide: tl.constexpr = tl.float64 if old.dtype == tl.float64 else tl.float32
    # decay * target + (1 - decay) * source
    mixed = keep.to(wide) * old.to(wide) + (1 - keep).to(wide) * new.to(wide)
    value = tl.where(replace, new.to(wide), mixed).to(old.dtype)
    tl.store(target + columns, value, mask=mask & (not stay))
    if HAS_COPY:
        value = tl.where(stay, old, value)
        # float64 reaches the 16-bit types by way of float32, as in torch.
        to: tl.constexpr = copy.dtype.element_ty
        tl.store(copy + columns, (value if to == tl.float64 else value.to(tl.float32)).to(to), mask=mask)


@triton.jit(do_not_specialize=["decay_bits"])
def _ema_update_kernel(
    table_ptr, chunk_pair_ptr, decay_bits, decay_ptr,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, HAS_COPY: tl.constexpr, DECAY_ON_DEVICE: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if DECAY_ON_DEVICE:
        keep = tl.load(decay_ptr).to(tl.float64)
        keep = tl.where((keep >= 0) & (keep <= 1), keep, float("nan"))
    else:
        keep = decay_bits.to(tl.int64).to(tl.float64, bitcast=True)
    # A row of the table: three addresses, the element count, the number of the tensor's first chunk.
    chunk = tl.program_id(0).to(tl.int64)
    row = table_ptr + 5 * tl.load(chunk_pair_ptr + chunk).to(tl.int64)
    target = tl.load(row).to(tl.pointer_type(T))
    source = tl.load(row + 1).to(tl.pointer_type(S))
    copy = tl.load(row + 2).to(tl.pointer_type(C))
    count, begin = tl.load(row + 3), (chunk - tl.load(row + 4)) * CHUNK
    # Masks that change only every 8 elements let aligned tensors be read 16 bytes at a time; the rest comes after.
    whole = count // 8 * 8 if ALIGNED else count
    if ALIGNED:
        target, source = tl.multiple_of(target, 16), tl.multiple_of(source, 16)
        copy = tl.multiple_of(copy, 16)
    for offset in range(0, CHUNK, BLOCK):
        columns = begin + offset + tl.arange(0, BLOCK)
        _update_columns(target, source, copy, columns, columns < whole, keep, HAS_COPY)
    if ALIGNED and whole < count and begin + CHUNK >= count:
        columns = whole + tl.arange(0, 8)
        _update_columns(target, source, copy, columns, columns < count, keep, HAS_COPY)


@cache
def _reader() -> object | None:
    """The compiled reader of tensor lists, or None where there is no compiled module."""
    module = _backend.native()
    return None if module is None else module.TensorReader(torch.Tensor, torch.nn.Parameter)


def prepare(targets: Tensors, sources: Tensors, copies: Tensors) -> tuple[np.ndarray, Tensors]:
    """The table of addresses that the kernels work through, of tensors that pass every check; and the sources in it.

    Thousands of tensors make a Python loop the largest cost of a small update. The usual case goes through the compiled
    `TensorReader` (DLPack's C exchange table, torch >= 2.10): 2,000 pairs in 0.3 ms instead of 5 ms. The Python below
    serves the rest: a strided source, a tensor subclass, an overlap, no compiled module.

    Args:
        targets, sources: as in `ema_update_`; a strided source is copied.
        copies: those of the first len(copies) targets.

    Raises:
        TypeError, ValueError: as `ema_update_` does for its tensors.
    """
    table = np.empty(len(targets), PAIR)
    reader = _reader()
    if reader is not None and reader.ema_pairs(targets, sources, copies, table.ctypes.data):  # type: ignore[attr-defined]
        return table, sources
    check_lists(targets, sources, [*copies, *[None] * (len(targets) - len(copies))])
    _check_memory([*targets, *copies], sources)
    sources = [x.contiguous() for x in sources]
    return _python_table(targets, sources, copies), sources


def _python_table(targets: Tensors, sources: Tensors, copies: Tensors) -> np.ndarray:
    table = np.zeros(len(targets), PAIR)
    for column, tensors in enumerate((targets, sources, copies)):
        table["address"][: len(tensors), column] = [x.data_ptr() for x in tensors]
        table["dtype"][: len(tensors), column] = [_registry.dtype_code(x.dtype) for x in tensors]
    table["count"] = [x.numel() for x in targets]
    return table


def check_lists(targets: Tensors, sources: Tensors, copies: Sequence[torch.Tensor | None] | None) -> None:
    """Raises TypeError or ValueError for the first tensor that has no place in an update."""
    for i, target in enumerate(targets):
        require_floating(WHERE, f"targets[{i}]", target)
    for name, tensors in (("targets", targets), ("sources", sources), ("copies", copies)):
        if tensors is None:
            continue
        require(len(tensors) == len(targets), WHERE, name, f"as long as targets, {len(targets)}", len(tensors))
        for i, x in enumerate(tensors):
            if x is not None or name != "copies":
                _check_tensor(name, i, x, targets)


def _check_tensor(name: str, i: int, x: torch.Tensor | None, targets: Tensors) -> None:
    here = f"{name}[{i}]"
    require_floating(WHERE, here, x)
    assert x is not None
    shape, device = targets[i].shape, targets[0].device
    require(x.shape == shape, WHERE, here, f"of targets[{i}]'s shape {tuple(shape)}", tuple(x.shape))
    require(x.device == device, WHERE, here, f"on targets[0]'s device {device}", x.device)
    require(x.layout == torch.strided, WHERE, here, "dense", f"layout {x.layout}")
    if name != "sources":
        require(x.is_contiguous(), WHERE, here, "contiguous, as it is written", f"strides {x.stride()}")
        require(not x.requires_grad, WHERE, here, "a tensor without requires_grad", "requires_grad=True")


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The address of the first byte and of the one past the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _check_memory(written: Tensors, read: Tensors) -> None:
    """Raises ValueError where a written tensor shares memory with another written or a read one; O(n log n)."""
    spans = [(*_span(x), True) for x in written if x.numel()] + [(*_span(x), False) for x in read if x.numel()]
    any_end = written_end = 0  # the furthest end of the ranges so far, and of the written ones
    for begin, end, is_written in sorted(spans):
        clash = begin < (any_end if is_written else written_end)
        require(not clash, WHERE, "targets and copies", "memory of their own", "an overlap among them or with a source")
        any_end = max(any_end, end)
        written_end = max(written_end, end) if is_written else written_end


def _read_decay(
    decay: float, decay_tensor: torch.Tensor | None, device: torch.device | None
) -> tuple[float, torch.Tensor | None]:
    """The decay as a number, or as a tensor where it lies on `device`, to be read by the kernel there."""
    if decay_tensor is None or decay_tensor.device == device:
        return decay, decay_tensor
    value = float(decay_tensor)
    require(0.0 <= value <= 1.0, WHERE, "decay", "in [0, 1]", value)
    return value, None


@lru_cache(maxsize=16)
def _chunk_tables(table: bytes, chunk: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's table and the row of each chunk, on the device.

    Weights stay where they are, so a later step with the same addresses finds its tables here: no copy and no host
    sync. A CUDA graph captured after one such step holds on to them only while no 16 other tables follow.
    """
    rows = np.frombuffer(table, PAIR)
    chunks = -(-rows["count"] // chunk)
    first = np.cumsum(chunks) - chunks
    columns = np.column_stack([rows["address"], rows["count"], first])
    of_chunk = np.repeat(np.arange(len(rows), dtype=np.int32), chunks)
    return torch.from_numpy(columns).to(device), torch.from_numpy(of_chunk).to(device)


_TRITON_DTYPES = {0: tl.float32, 1: tl.float64, 2: tl.bfloat16, 3: tl.float16}  # by csrc/kernels.h: DType


def launch_triton(table: np.ndarray, decay: float, on_device: torch.Tensor | None, device: torch.device) -> None:
    """One launch for each combination of dtypes and alignment in the table; the decay is `on_device`'s where given."""
    has_copy, types = table["address"][:, 2] != 0, table["dtype"][:, :3]
    # float64 is 8 bytes an access anyway, and spills registers in the wider form.
    whole = (table["address"] % 16 == 0).all(1) & (types != _registry.DTYPE_CODES[torch.float64]).all(1)
    kinds = (types * (1, 4, 16)).sum(1) + 64 * has_copy + 128 * whole
    bits = int(np.float64(decay).view(np.int64))
    for kind in np.unique(kinds[table["count"] > 0]).tolist():
        rows = table[(kinds == kind) & (table["count"] > 0)]
        t, s, c = (_TRITON_DTYPES[kind >> shift & 3] for shift in (0, 2, 4))
        aligned = kind >= 128
        chunk, block, num_warps = launch_config(int(rows["count"].max()), aligned)
        device_table, chunk_pair = _chunk_tables(rows.tobytes(), chunk, device)
        _ema_update_kernel[(len(chunk_pair),)](
            device_table, chunk_pair, bits, device_table if on_device is None else on_device, T=t, S=s, C=c,
            HAS_COPY=bool(kind & 64), DECAY_ON_DEVICE=on_device is not None, ALIGNED=aligned,
            CHUNK=chunk, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip


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
