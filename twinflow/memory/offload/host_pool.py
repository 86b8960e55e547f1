"""Host memory: what there is, slabs of it, `HostPool`; `Transfers`: the copies to it and back, by device."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GRAIN = 4096  # bytes; every buffer starts and ends on a multiple of it

Extent = tuple[int, int, int]  # number of a slab, [start, stop) in its bytes


def available_host_bytes(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that can be taken without swapping, bytes: the kernel's figure, or a container's limit if that is less.

    Args:
        meminfo: where the kernel says it (MemAvailable).
        group: where a container's limit and use are (cgroup v2).

    Returns:
        None where neither says.
    """
    found = []
    try:
        lines = [line.split() for line in meminfo.read_text().splitlines()]
        found += [int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"]
    except OSError:
        pass
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        if limit != "max":
            found.append(max(int(limit) - int(used), 0))
    except OSError:
        pass
    return min(found, default=None)


def host_slabs(sizes: Iterable[int], pinned: bool, where: str) -> Iterator[torch.Tensor]:
    """Host memory of some sizes, uint8, one after another as they are asked for.

    Args:
        sizes: bytes; torch rounds pinned memory up to powers of two.
        where: function and amount, for the message.

    Raises:
        RuntimeError: the system refuses.
    """
    taken = 0
    for size in sizes:
        try:
            slab = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        except RuntimeError as error:
            instead = (
                "; take less, raise the limit on locked memory (`ulimit -l`), or pass pin_memory=False, which takes "
                "pageable memory: copies are then synchronous, about 2-4x slower, and hide behind no computation"
            )
            raise RuntimeError(
                f"{where} of host memory must be {'pinned' if pinned else 'allocated'}, got a refusal after "
                f"{taken / 1e9:.3f} GB{instead if pinned else ''} ({error})"
            ) from error
        taken += size
        yield slab


class HostPool:
    """Buffers in host memory that is taken from the system once (a pinned allocation costs about 3 ms).

    A buffer lies in one piece where a gap is large enough, else in several: it fits whenever that much is free.

    Args:
        capacity: bytes, rounded down to a multiple of `GRAIN`.
        pinned: whether the memory is; None: there is none, for data on meta.

    Attributes:
        nbytes, peak_nbytes: bytes in use now, and at most so far.
    """

    def __init__(self, capacity: int, pinned: bool | None) -> None:
        self.capacity, self.pinned = capacity // GRAIN * GRAIN, bool(pinned)
        self.nbytes = self.peak_nbytes = 0
        sizes = [1 << bit for bit in reversed(range(self.capacity.bit_length())) if self.capacity >> bit & 1]
        where = f"offload_activations: {self.capacity / 1e9:.3f} GB"
        self._slabs = [] if pinned is None else [*host_slabs(sizes, pinned, where)]
        self._gaps: list[Extent] = [(number, 0, size) for number, size in enumerate(sizes)]

    def allocate(self, nbytes: int) -> list[Extent] | None:
        """A buffer of at least so many bytes; None where the pool is too full."""
        missing = -(-nbytes // GRAIN) * GRAIN
        if missing > self.capacity - self.nbytes:
            return None
        self.nbytes += missing
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        buffer: list[Extent] = []
        while missing:
            gap = next((g for g in self._gaps if g[2] - g[1] >= missing), None)
            slab, start, stop = gap or max(self._gaps, key=lambda g: g[2] - g[1])
            end = min(stop, start + missing)
            place = self._gaps.index((slab, start, stop))
            self._gaps[place : place + 1] = [(slab, end, stop)] if end < stop else []
            buffer.append((slab, start, end))
            missing -= end - start
        return buffer

    def free(self, buffer: Sequence[Extent]) -> None:
        """Takes a buffer back."""
        gaps: list[Extent] = []
        for slab, start, stop in sorted([*self._gaps, *buffer]):
            if gaps and (gaps[-1][0], gaps[-1][2]) == (slab, start):
                start = gaps.pop()[1]
            gaps.append((slab, start, stop))
        self._gaps = gaps
        self.nbytes -= sum(stop - start for _, start, stop in buffer)

    def parts(self, buffer: Sequence[Extent]) -> list[torch.Tensor]:
        """The memory of a buffer, uint8; none on meta."""
        return [self._slabs[slab][start:stop] for slab, start, stop in buffer] if self._slabs else []


@dataclass(frozen=True)
class Ticket:
    """A copy under way: the event after it, and the stream on which its device memory was allocated."""

    event: Any
    stream: Any


class Transfers:
    """Copies of the CPU's own tensors, done when the call returns; on meta there is nothing to copy.

    Args:
        asynchronous: whether the memory that is saved must outlive the call; on meta it does, as on a GPU.
    """

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous = asynchronous

    def save(self, source: torch.Tensor, parts: list[torch.Tensor]) -> Ticket | None:
        """Copies device memory (uint8) to a buffer."""
        self._copy(source, parts, out=True)
        return None

    def load(self, target: torch.Tensor, parts: list[torch.Tensor], saved: Ticket | None) -> Ticket | None:
        """Copies a buffer to device memory (uint8), once it is `saved`."""
        self._copy(target, parts, out=False)
        return None

    def ready(self, ticket: Ticket | None) -> None:
        """What is enqueued from now on comes after a copy."""

    def settle(self, ticket: Ticket | None) -> None:
        """Whoever is given a copy's device memory from now on comes after the copy."""

    def _copy(self, memory: torch.Tensor, parts: list[torch.Tensor], out: bool) -> None:
        start = 0
        for part in parts if not memory.is_meta else ():
            inside = memory[start : start + len(part)]
            start += len(part)
            target, source = (part[: len(inside)], inside) if out else (inside, part[: len(inside)])
            target.copy_(source, non_blocking=self.asynchronous)


class CudaTransfers(Transfers):
    """Copies on a stream for each direction; streams wait for each other, the host for nothing."""

    def __init__(self, device: torch.device, pinned: bool) -> None:
        super().__init__(asynchronous=pinned)
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def save(self, source: torch.Tensor, parts: list[torch.Tensor]) -> Ticket:
        self._out.wait_stream(self._in)  # the buffer's last owner may still be read
        return self._enqueued(self._out, source, parts)

    def load(self, target: torch.Tensor, parts: list[torch.Tensor], saved: Ticket | None) -> Ticket:
        if saved is not None:
            self._in.wait_event(saved.event)
        return self._enqueued(self._in, target, parts)

    def _enqueued(self, stream: torch.cuda.Stream, memory: torch.Tensor, parts: list[torch.Tensor]) -> Ticket:
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)  # what is saved is made there; a target's last owner may still be in use there
        with torch.cuda.stream(stream):
            self._copy(memory, parts, out=stream is self._out)
            return Ticket(stream.record_event(), current)

    def ready(self, ticket: Ticket | None) -> None:
        if ticket is not None:
            torch.cuda.current_stream(self._device).wait_event(ticket.event)

    def settle(self, ticket: Ticket | None) -> None:
        if ticket is not None:
            ticket.stream.wait_event(ticket.event)


def transfers_for(device: torch.device, pinned: bool) -> Transfers:
    """The copies of a device's tensors."""
    return CudaTransfers(device, pinned) if device.type == "cuda" else Transfers(device.type == "meta")
