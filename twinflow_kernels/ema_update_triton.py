"""Triton kernel and launcher of `ema_update_`: programs walk chunks of tensors found through a table of addresses."""

from functools import lru_cache

import numpy as np
import torch

from twinflow_kernels._ema_pairs import PAIR
from twinflow_kernels._triton import tl, triton


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
    """One launch for each combination of dtypes in the table; the decay is `on_device`'s where that is given."""
    has_copy = table["address"][:, 2] != 0
    kinds = (table["dtype"][:, :3] * (1, 4, 16)).sum(1) + 64 * has_copy
    bits = int(np.float64(decay).view(np.int64))
    for kind in np.unique(kinds[table["count"] > 0]).tolist():
        rows = table[(kinds == kind) & (table["count"] > 0)]
        t, s, c = (_TRITON_DTYPES[kind >> shift & 3] for shift in (0, 2, 4))
        # float64 is 8 bytes an access anyway, and spills registers in the wider form.
        aligned = not (rows["address"] % 16).any() and tl.float64 not in (t, s, c)
        chunk, block, num_warps = launch_config(int(rows["count"].max()), aligned)
        device_table, chunk_pair = _chunk_tables(rows.tobytes(), chunk, device)
        _ema_update_kernel[(len(chunk_pair),)](
            device_table, chunk_pair, bits, device_table if on_device is None else on_device, T=t, S=s, C=c,
            HAS_COPY=kind >= 64, DECAY_ON_DEVICE=on_device is not None, ALIGNED=aligned,
            CHUNK=chunk, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
