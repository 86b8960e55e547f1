"""What activation offload knows of saved tensors: storages, versions, and which of them are on the device."""

import weakref
from collections import deque

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from twinflow.memory.offload.host_pool import Extent, Ticket, Transfers


def stretch(tensor: torch.Tensor) -> tuple[int, int]:
    """(start, length) in bytes of what is saved for a tensor: its storage, or its span if that is less than half."""
    size, item = tensor.untyped_storage().nbytes(), tensor.element_size()
    last: int = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    span = (last + 1) * item
    return (int(tensor.storage_offset()) * item, span) if 2 * span < size else (0, size)


def stays(tensor: torch.Tensor, min_bytes: int) -> bool:
    """Whether a tensor is not for offload: a parameter, another leaf, a view of one, small, or no plain memory."""
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.numel() == 0:
        return True  # subclasses: parameters, sharded and quantised tensors
    if tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg():
        return True
    base = tensor if tensor._base is None else tensor._base
    if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
        return True
    return tensor.untyped_storage().nbytes() < min_bytes


class SavedStorage:
    """A storage, or a stretch of it, at one version; without a buffer (`extents`) it stays on the device.

    Attributes:
        number, start, nbytes: of this record; where it begins in the storage; its length.
        data: its bytes on the device (uint8) while they are held there, from the pool if `loaded` is a ticket.
        users: the saved tensors in it; those of this `epoch` were unpacked since it last left the device.
    """

    def __init__(self, data: torch.Tensor, number: int, transfers: Transfers, dead: deque) -> None:
        self.data: torch.Tensor | None = data
        self.number, self.start, self.nbytes = number, data.storage_offset(), len(data)
        self.extents: tuple[Extent, ...] = ()
        self.saved: Ticket | None = None
        self.loaded: Ticket | None = None
        self.users: list[weakref.ref[SavedTensor]] = []
        self.epoch = 0
        self._device, self._transfers, self._dead = data.device, transfers, dead
        self._origin = StorageWeakRef(data.untyped_storage())  # while it is held, no other storage has that address
        self._alive, self._offset = self._origin, self.start

    def revive(self) -> bool:
        """Holds its bytes on the device again, if someone still does."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._alive.cdata)
        if storage is None or storage.nbytes() < self._offset + self.nbytes:
            return False
        empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
        self.data = empty.set_(storage, self._offset, (self.nbytes,), (1,))
        return True

    def load(self, parts: list[torch.Tensor]) -> None:
        """Brings its bytes from the buffer to new device memory."""
        self.data = torch.empty(self.nbytes, dtype=torch.uint8, device=self._device)
        self.loaded = self._transfers.load(self.data, parts, self.saved)
        self._alive, self._offset = StorageWeakRef(self.data.untyped_storage()), 0

    def wait(self) -> None:
        """What is enqueued from now on comes after its bytes are back."""
        self._transfers.ready(self.loaded)

    def let_go(self) -> None:
        """Gives the device memory up, to whoever comes after the copy from or to it."""
        if self.data is not None:
            self._transfers.settle(self.saved if self.loaded is None else self.loaded)
            self.data = None

    def is_used_up(self) -> bool:
        """Whether every saved tensor in it has been unpacked in this epoch."""
        return all(user is None or user.epoch == self.epoch for user in (ref() for ref in self.users))

    def __del__(self) -> None:
        self.let_go()
        # Finalizers run amid anything, with or without locks: the pool takes the buffer back later.
        self._dead.append((self.number, self.extents))


class SavedTensor:
    """A saved tensor as a view of a record; `number` counts them in the order of packing."""

    def __init__(self, tensor: torch.Tensor, record: SavedStorage, number: int) -> None:
        self.record, self.number, self.epoch = record, number, -1
        self._dtype, self._shape, self._stride = tensor.dtype, tensor.shape, tensor.stride()
        self._offset = tensor.storage_offset() - record.start // tensor.element_size()
        # Keeps the version counter, not the memory.
        self._counter = tensor.detach()
        self._counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._version = self._counter._version

    def check(self) -> None:
        """Raises RuntimeError if the tensor was modified in place after it was saved."""
        _check_version(self._counter, self._version, f"{self._dtype} {tuple(self._shape)}")

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor, in its record's bytes on the device."""
        offset = data.storage_offset() // self._dtype.itemsize + self._offset
        empty = torch.empty(0, dtype=self._dtype, device=data.device)
        return empty.set_(data.untyped_storage(), offset, self._shape, self._stride)


class UntouchedTensor:
    """A saved tensor that is not for offload."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor if tensor.is_leaf else tensor.detach()  # an output would keep its own graph alive
        self._version = tensor._version

    def check(self) -> None:
        """Raises RuntimeError if the tensor was modified in place after it was saved."""
        _check_version(self.tensor, self._version, f"{self.tensor.dtype} {tuple(self.tensor.shape)}")


class Window:
    """Records that hold device memory beside what graphs are using, at most `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._records: dict[int, tuple[int, weakref.ref[SavedStorage], int]] = {}

    def add(self, record: SavedStorage, saved: int) -> None:
        """Takes in a record that backward needs when it comes to the saved tensor of this number."""
        self.discard(record.number)
        self._records[record.number] = (saved, weakref.ref(record), record.nbytes)
        self.nbytes += record.nbytes

    def discard(self, number: int) -> None:
        """Forgets a record."""
        if number in self._records:
            self.nbytes -= self._records.pop(number)[2]

    def shrink(self) -> None:
        """Lets go what backward needs last, until the rest is within the limit."""
        while self.nbytes > self.limit:
            number = min(self._records, key=lambda number: self._records[number][0])
            record = self._records[number][1]()
            if record is not None:
                record.let_go()
            self.discard(number)


def _check_version(tensor: torch.Tensor, saved: int, what: str) -> None:
    # With hooks, autograd leaves this check to them.
    if tensor._version != saved:
        raise RuntimeError(
            f"offload_activations: saved tensors must be as they were saved, got one ({what}) that has been modified "
            f"by an inplace operation: it is at version {tensor._version}, was saved at version {saved}"
        )
