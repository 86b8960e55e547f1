"""`HostPool`: host memory for offloaded tensors, taken once; `Transfers`: the copies to it and back, by device."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GRAIN = 4096  # bytes; every buffer starts and ends on a multiple of it

Extent = tuple[int, int]  # [start, stop) in bytes of the pool


def slab_sizes(nbytes: int) -> list[int]:
    """Powers of two that add up to a size, largest first: torch rounds pinned memory up to them."""
    return [1 << bit for bit in reversed(range(nbytes.bit_length())) if nbytes >> bit & 1]


class HostPool:
    """Buffers in host memory that is taken from the system once (a pinned allocation costs about 3 ms).

    A buffer lies in one piece where a gap is large enough, else in several: it fits whenever that much is free.

    Args:
        capacity: bytes, rounded down to a multiple of `GRAIN`.

    Attributes:
        nbytes, peak_nbytes: bytes in use now, and at most so far.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // GRAIN * GRAIN
        self.nbytes = self.peak_nbytes = 0
        self._gaps: list[Extent] = [(0, self.capacity)] if self.capacity else []
        self._slabs: list[torch.Tensor] = []
        self._starts: list[int] = []

    def take_memory(self, pinned: bool) -> None:
        """Takes the pool's memory from the system; nothing where that is done already.

        Raises:
            RuntimeError: the system does not let as much be pinned.
        """
        if self._slabs:
            return
        slabs = []
        for size in slab_sizes(self.capacity):
            try:
                slabs.append(torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned))
            except RuntimeError as error:
                kind = "pinned" if pinned else "allocated"
                pageable = (
                    "; lower it, raise the limit on locked memory (`ulimit -l`), or pass pin_memory=False, which takes "
                    "pageable memory: copies are then synchronous, about 2-4x slower, and hide behind no computation"
                )
                raise RuntimeError(
                    f"offload_activations: budget_gb must be an amount of host memory that can be {kind}, got "
                    f"{self.capacity / 1e9:.3f} GB, refused after {sum(len(s) for s in slabs) / 1e9:.3f} GB"
                    f"{pageable if pinned else ''} ({error})"
                ) from error
        self._slabs = slabs
        self._starts = [sum(len(slab) for slab in slabs[:i]) for i in range(len(slabs))]

    def allocate(self, nbytes: int) -> tuple[Extent, ...] | None:
        """A buffer of at least so many bytes, first fit; None where the pool is too full."""
        missing = -(-nbytes // GRAIN) * GRAIN
        if missing > self.capacity - self.nbytes:
            return None
        self.nbytes += missing
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        whole = next((gap for gap in self._gaps if gap[1] - gap[0] >= missing), None)
        taken = []
        for start, stop in [whole] if whole else sorted(self._gaps, key=lambda gap: gap[0] - gap[1]):
            self._gaps.remove((start, stop))
            end = min(stop, start + missing)
            if end < stop:
                bisect.insort(self._gaps, (end, stop))
            taken.append((start, end))
            missing -= end - start
            if not missing:
                break
        return tuple(taken)

    def free(self, extents: Sequence[Extent]) -> None:
        """Takes a buffer back."""
        for start, stop in extents:
            self.nbytes -= stop - start
            place = bisect.bisect(self._gaps, (start, stop))
            if place < len(self._gaps) and self._gaps[place][0] == stop:
                stop = self._gaps.pop(place)[1]
            if place and self._gaps[place - 1][1] == start:
                place -= 1
                start = self._gaps.pop(place)[0]
            self._gaps.insert(place, (start, stop))

    def parts(self, extents: Sequence[Extent], nbytes: int) -> list[torch.Tensor]:
        """The memory of a buffer's first `nbytes`, uint8, cut where slabs and pieces end; none before it is taken."""
        found: list[torch.Tensor] = []
        if not self._slabs:
            return found
        for start, stop in extents:
            stop = min(stop, start + nbytes)
            while start < stop:
                number = bisect.bisect(self._starts, start) - 1
                slab, offset = self._slabs[number], start - self._starts[number]
                found.append(slab[offset : offset + stop - start])
                start += len(found[-1])
                nbytes -= len(found[-1])
        return found


@dataclass(frozen=True)
class Ticket:
    """A copy under way: the event after it, and the stream on which its device memory was allocated."""

    event: Any
    stream: Any


class Transfers:
    """Copies of the CPU's own tensors, done when the call returns.

    Attributes:
        asynchronous: whether the memory that is saved must outlive the call.
    """

    asynchronous = False

    def save(self, source: torch.Tensor, parts: list[torch.Tensor]) -> Ticket | None:
        """Copies device memory (uint8) to a buffer."""
        for inside, part in _pairs(source, parts):
            part.copy_(inside)
        return None

    def load(self, target: torch.Tensor, parts: list[torch.Tensor], saved: Ticket | None) -> Ticket | None:
        """Copies a buffer to device memory (uint8), once it is `saved`."""
        for inside, part in _pairs(target, parts):
            inside.copy_(part)
        return None

    def ready(self, ticket: Ticket | None) -> None:
        """What is enqueued from now on comes after a copy."""

    def settle(self, ticket: Ticket | None) -> None:
        """Whoever is given a copy's device memory from now on comes after the copy."""


class MetaTransfers(Transfers):
    """Copies nothing, and keeps what is saved as long as a GPU might have to."""

    asynchronous = True

    def save(self, source: torch.Tensor, parts: list[torch.Tensor]) -> None:
        return None

    def load(self, target: torch.Tensor, parts: list[torch.Tensor], saved: Ticket | None) -> None:
        return None


class CudaTransfers(Transfers):
    """Copies on a stream for each direction; streams wait for each other, the host for nothing.

    Args:
        device: with its index.
        pinned: whether the pool is; copies of pageable memory hold the host up.
    """

    def __init__(self, device: torch.device, pinned: bool) -> None:
        self.asynchronous = pinned
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def save(self, source: torch.Tensor, parts: list[torch.Tensor]) -> Ticket:
        current = torch.cuda.current_stream(self._device)
        self._out.wait_stream(current)
        self._out.wait_stream(self._in)  # the buffer's last owner may still be read
        with torch.cuda.stream(self._out):
            for inside, part in _pairs(source, parts):
                part.copy_(inside, non_blocking=self.asynchronous)
            return Ticket(self._out.record_event(), current)

    def load(self, target: torch.Tensor, parts: list[torch.Tensor], saved: Ticket | None) -> Ticket:
        current = torch.cuda.current_stream(self._device)
        self._in.wait_stream(current)  # the target's last owner may still be in use
        if saved is not None:
            self._in.wait_event(saved.event)
        with torch.cuda.stream(self._in):
            for inside, part in _pairs(target, parts):
                inside.copy_(part, non_blocking=self.asynchronous)
            return Ticket(self._in.record_event(), current)

    def ready(self, ticket: Ticket | None) -> None:
        if ticket is not None:
            torch.cuda.current_stream(self._device).wait_event(ticket.event)

    def settle(self, ticket: Ticket | None) -> None:
        if ticket is not None:
            ticket.stream.wait_event(ticket.event)


def transfers_for(device: torch.device, pinned: bool) -> Transfers:
    """The copies of a device's tensors."""
    if device.type == "cuda":
        return CudaTransfers(device, pinned)
    return MetaTransfers() if device.type == "meta" else Transfers()


def _pairs(inside: torch.Tensor, parts: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each part of a buffer with its stretch of the device memory."""
    start = 0
    for part in parts:
        yield inside[start : start + len(part)], part
        start += len(part)
