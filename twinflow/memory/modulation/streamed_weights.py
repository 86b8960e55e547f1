"""`StreamedWeights`: linear layers whose weights stay in host memory, and visit the device one after another."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from twinflow.errors import ArgumentError
from twinflow.memory.offload.host_pool import Ticket, available_host_bytes, host_slabs, transfers_for

LARGEST_SLAB = 1 << 32  # bytes; torch rounds pinned memory up to powers of two, which slabs of many layers make cheap
GRAIN = 512  # bytes; each layer starts on a multiple of it
_BUFFERS = 2  # on the device: one is computed with while the next is filled


class StreamedWeights:
    """Frozen linear layers with their parameters in host memory.

    Args:
        layers: float weights, with or without bias; their parameters' `.data` is exchanged.
        device: where they are used. On the CPU nothing moves, and on meta nothing is copied.
        pin_memory: False: pageable host memory, whose copies hold the host up.

    Raises:
        ValueError: the host has too little memory.
        RuntimeError: the system does not let as much be pinned.

    Attributes:
        nbytes: of all parameters.
    """

    def __init__(self, layers: Sequence[nn.Linear], device: torch.device, pin_memory: bool = True) -> None:
        self._layers, self._device, self._pinned = list(layers), device, pin_memory
        self._sizes = [_layer_bytes(layer) for layer in layers]
        self.nbytes = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
        self._transfers = transfers_for(device, pin_memory)
        self._places: list[list[torch.Tensor]] = []  # of each layer's parameters, uint8
        self._homes: list[tuple[torch.Tensor, torch.device]] = []  # parameters that moved, and where they were
        if device.type == "cuda":
            self._take_memory()

    def sweep(self, reverse: bool = False) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """Number, weight and bias of each layer on the device; valid until the next one is asked for."""
        order = list(range(len(self._layers)))
        if reverse:
            order.reverse()
        if self._device.type == "cpu":
            for number in order:
                layer = self._layers[number]
                yield number, layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
            return
        buffers = [torch.empty(max(self._sizes), dtype=torch.uint8, device=self._device) for _ in range(_BUFFERS)]
        following: list[int | None] = [*order[1:], None]
        ticket = self._load(buffers[0], order[0])
        try:
            for turn, (number, after) in enumerate(zip(order, following, strict=True)):
                buffer, arrived = buffers[turn % _BUFFERS], ticket
                if after is not None:  # enqueued before this layer's use, so that it waits for the one before only
                    ticket = self._load(buffers[(turn + 1) % _BUFFERS], after)
                self._transfers.ready(arrived)
                yield number, *_views(buffer, self._layers[number])
        finally:
            self._transfers.ready(ticket)  # where it ends early too: a copy under way would land in others' memory

    def bring_back(self) -> None:
        """Gives the layers their parameters back where they were, and the host its memory; may be called again."""
        for parameter, device in self._homes:
            parameter.data = parameter.data.to(device, copy=True)
        self._places, self._homes = [], []

    def _load(self, buffer: torch.Tensor, number: int) -> Ticket | None:
        if self._device.type == "meta":
            return None
        ticket = None
        for (_, start, stop), place in zip(_layout(self._layers[number]), self._places[number], strict=True):
            ticket = self._transfers.load(buffer[start:stop], [place], None)
        return ticket

    def _take_memory(self) -> None:
        """Moves the parameters into slabs of host memory, slab by slab."""
        groups = slabs(self._sizes)
        self._check_host(max(size for size, _ in groups))
        where = f"defer_modulation: {sum(self._sizes) / 1e9:.1f} GB"
        try:
            taken = host_slabs((size for size, _ in groups), self._pinned, where)
            for (_, numbers), slab in zip(groups, taken, strict=True):
                self._fill(slab, numbers)
        except RuntimeError:
            self.bring_back()
            raise

    def _fill(self, slab: torch.Tensor, numbers: list[int]) -> None:
        """Moves some layers' parameters into a slab."""
        first = 0
        for number in numbers:
            self._places.append([])
            for parameter, start, stop in _layout(self._layers[number]):
                inside = slab[first + start : first + stop]
                place = torch.from_numpy(inside.numpy())  # a storage of its own size: what is saved is no slab
                view = place.view(parameter.dtype).view(parameter.shape)
                view.copy_(parameter.data)
                self._homes.append((parameter, parameter.device))
                parameter.data = view
                self._places[-1].append(place)
            first += self._sizes[number]

    def _check_host(self, largest: int) -> None:
        on_host = all(p.device.type == "cpu" for layer in self._layers for p in layer.parameters())
        needed, available = largest if on_host else sum(self._sizes), available_host_bytes()
        if available is not None and needed > available:
            wanted = f"{needed / 1e9:.1f} GB of memory available for the modulation weights"
            raise ArgumentError("defer_modulation", "the host", wanted, f"{available / 1e9:.1f} GB", verb="have")


def slabs(sizes: Sequence[int], largest: int = LARGEST_SLAB) -> list[tuple[int, list[int]]]:
    """Powers of two that hold all of some sizes in order, each whole, with little left over.

    Args:
        largest: bytes of a slab, at most, unless one size alone needs more.

    Returns:
        (bytes, numbers of the sizes in it) of each slab.
    """
    found = []
    start = 0
    while start < len(sizes):
        left = sum(sizes[start:])
        slab = max(min(largest, 1 << (left.bit_length() - 1)), 1 << (sizes[start] - 1).bit_length())
        stop, held = start, 0
        while stop < len(sizes) and held + sizes[stop] <= slab:
            held += sizes[stop]
            stop += 1
        found.append((slab, list(range(start, stop))))
        start = stop
    return found


def _layout(layer: nn.Linear) -> list[tuple[torch.Tensor, int, int]]:
    """Weight and bias, if it has one, each with its [start, stop) in bytes of memory for both."""
    found, start = [], 0
    for parameter in [layer.weight] if layer.bias is None else [layer.weight, layer.bias]:
        stop = start + parameter.numel() * parameter.element_size()
        found.append((parameter, start, stop))
        start = -(-stop // GRAIN) * GRAIN
    return found


def _layer_bytes(layer: nn.Linear) -> int:
    return -(-_layout(layer)[-1][2] // GRAIN) * GRAIN


def _views(memory: torch.Tensor, layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's weight and bias in memory."""
    weight, *bias = [memory[start:stop].view(p.dtype).view(p.shape) for p, start, stop in _layout(layer)]
    return weight, bias[0] if bias else None
