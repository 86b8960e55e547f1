"""`OffloadHooks`: the pack and unpack hooks of `offload_activations`, and what they know of saved tensors."""

import threading
import weakref
from collections import deque
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from twinflow.memory.offload.host_pool import Extent, HostPool, Ticket, Transfers, transfers_for

DEVICES = ("cuda", "cpu", "meta")
LOOKAHEAD = 64  # saved tensors among which backward looks for the next ones to fetch


@dataclass
class OffloadStats:
    """What an offload has done since it was made.

    Attributes:
        tensors, deduplicated: saved tensors that went to the pool; those of them whose storage was there already.
        bytes_offloaded, bytes_restored: copied to the pool, and back.
        bytes_kept: left on the device because the pool was full.
        pool_bytes, peak_pool_bytes: in use now, and at most so far.
    """

    tensors: int = 0
    deduplicated: int = 0
    bytes_offloaded: int = 0
    bytes_restored: int = 0
    bytes_kept: int = 0
    pool_bytes: int = 0
    peak_pool_bytes: int = 0


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
    """A storage, or a stretch of it, at one version; without a buffer it stays on the device.

    Attributes:
        number, start, nbytes: of this record; where it begins in the storage; its length.
        data: its bytes on the device (uint8) while they are held there, from the pool if `loaded` is a ticket.
        buffer: where its bytes are in the pool.
        users: the saved tensors in it; those of this `epoch` were unpacked since it last left the device.
    """

    def __init__(self, data: torch.Tensor, number: int, transfers: Transfers, dead: deque) -> None:
        self.data: torch.Tensor | None = data
        self.number, self.start, self.nbytes = number, data.storage_offset(), len(data)
        self.buffer: list[Extent] = []
        self.saved: Ticket | None = None
        self.loaded: Ticket | None = None
        self.users: weakref.WeakSet[SavedTensor] = weakref.WeakSet()
        self.epoch = 0
        self._device, self._transfers, self._dead = data.device, transfers, dead
        self._origin = StorageWeakRef(data.untyped_storage())  # while it is held, no other storage has that address
        self._alive, self._offset = self._origin, self.start

    def bring_back(self, parts: list[torch.Tensor]) -> bool:
        """Holds its bytes on the device again; whether they had to be copied: no one else holds them there."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._alive.cdata)
        if storage is not None and storage.nbytes() >= self._offset + self.nbytes:
            empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
            self.data = empty.set_(storage, self._offset, (self.nbytes,), (1,))
            return False
        self.data = torch.empty(self.nbytes, dtype=torch.uint8, device=self._device)
        self.loaded = self._transfers.load(self.data, parts, self.saved)
        self._alive, self._offset = StorageWeakRef(self.data.untyped_storage()), 0
        return True

    def let_go(self) -> None:
        """Gives the device memory up, to whoever comes after the copy from or to it."""
        if self.data is not None:
            self._transfers.settle(self.saved if self.loaded is None else self.loaded)
            self.data = None

    def __del__(self) -> None:
        self.let_go()
        # Finalizers run amid anything, with or without locks: window and pool take their share back later.
        self._dead.append((self.number, self.buffer))


class SavedTensor:
    """What autograd holds for a tensor: a view of a record, or the tensor itself where it is not for offload."""

    def __init__(self, tensor: torch.Tensor, record: SavedStorage | None = None, number: int = 0) -> None:
        self.record, self.number, self.epoch = record, number, -1
        # An output itself would keep its own graph alive.
        self.tensor = tensor if record is None and tensor.is_leaf else tensor.detach()
        if record is not None:
            offset = tensor.storage_offset() - record.start // tensor.element_size()
            self._offset, self._shape, self._stride = offset, tensor.shape, tensor.stride()
            # Keeps the version counter, not the memory.
            self.tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._version = self.tensor._version

    def check(self) -> None:
        """Raises RuntimeError if the tensor was modified in place after it was saved: hooks do what autograd would."""
        if self.tensor._version != self._version:
            shape = self.tensor.shape if self.record is None else self._shape
            raise RuntimeError(
                f"offload_activations: saved tensors must be as they were saved, got one ({self.tensor.dtype} "
                f"{tuple(shape)}) that has been modified by an inplace operation: it is at version "
                f"{self.tensor._version}, was saved at version {self._version}"
            )

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor, in its record's bytes on the device."""
        empty = torch.empty(0, dtype=self.tensor.dtype, device=data.device)
        offset = data.storage_offset() // empty.element_size() + self._offset
        return empty.set_(data.untyped_storage(), offset, self._shape, self._stride)


class OffloadHooks:
    """What autograd calls; it does not know the object that has it, so that no cycle keeps the pool.

    Args:
        pool: where copies go.
        device: whose tensors to offload; None: that of the first.
        min_bytes: storages smaller than this stay on the device.
        window: bytes of records that hold device memory beside what graphs are using, at most.
    """

    def __init__(self, pool: HostPool, device: torch.device | None, min_bytes: int, window: int) -> None:
        self._pool, self._device, self._any_device = pool, device, device is None
        self._min_bytes, self._limit = min_bytes, window
        self._stats, self._number = OffloadStats(), 0
        self._transfers: Transfers | None = None
        self._records: weakref.WeakValueDictionary[tuple, SavedStorage] = weakref.WeakValueDictionary()
        self._saved: weakref.WeakValueDictionary[int, SavedTensor] = weakref.WeakValueDictionary()
        # By number of the record: of the saved tensor that backward needs it for, and its bytes.
        self._window: dict[int, tuple[int, int, weakref.ref[SavedStorage]]] = {}
        self._window_bytes = 0
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._owned: dict[int, StorageWeakRef] = {}
        self._dead: deque[tuple[int, list[Extent]]] = deque()
        self._lock = threading.RLock()  # backward runs on autograd's threads

    def stats(self) -> OffloadStats:
        """The counts so far."""
        with self._lock:
            self._collect()
            return replace(self._stats, pool_bytes=self._pool.nbytes, peak_pool_bytes=self._pool.peak_nbytes)

    def admit(self, module: nn.Module) -> None:
        """Learns a module's own storages at its first call.

        Raises:
            RuntimeError: the module is not on the device whose tensors are offloaded.
        """
        if module not in self._modules:
            self._modules.add(module)
            for tensor in chain(module.parameters(), module.buffers()):
                if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided:
                    storage = StorageWeakRef(tensor.untyped_storage())
                    self._owned[storage.cdata] = storage
        first = next(module.parameters(), None)
        if self._device is None or first is None or any(p.device == self._device for p in module.parameters()):
            return
        raise RuntimeError(
            f"offload_activations: module must be on {self._device}, whose tensors are offloaded, got it on "
            f"{first.device}; make a new offload_activations for a module that has moved"
        )

    def pack(self, tensor: torch.Tensor) -> SavedTensor:
        """Takes what autograd saves."""
        if stays(tensor, self._min_bytes) or tensor.untyped_storage()._cdata in self._owned:
            return SavedTensor(tensor)
        with self._lock:
            transfers = self._transfers_of(tensor.device)
            if transfers is None:
                return SavedTensor(tensor)
            self._collect()
            self._number += 1
            record = self._record_of(tensor, transfers)
            saved = self._saved[self._number] = SavedTensor(tensor, record, self._number)
            record.users.add(saved)
            if record.buffer and record.data is not None:
                self._hold(record, saved.number)
                self._shrink()
            return saved

    def unpack(self, saved: SavedTensor) -> torch.Tensor:
        """Gives back what autograd saved.

        Raises:
            RuntimeError: it was modified in place since.
        """
        saved.check()
        record = saved.record
        if record is None:
            return saved.tensor
        with self._lock:
            self._collect()
            data = self._on_device(record, saved.number)
            assert self._transfers is not None
            self._transfers.ready(record.loaded)
            saved.epoch = record.epoch
            if record.buffer and all(user.epoch == record.epoch for user in record.users):
                record.let_go()
                record.epoch += 1
                self._forget(record.number)
            self._shrink()
            self._prefetch(saved.number)
            return saved.view(data)

    def _record_of(self, tensor: torch.Tensor, transfers: Transfers) -> SavedStorage:
        """The record of a tensor's storage at its version; a new one is on its way to the pool, if that has room."""
        storage, (start, nbytes) = tensor.untyped_storage(), stretch(tensor)
        key = (storage._cdata, tensor._version, start, nbytes)
        record = self._records.get(key)
        if record is None:
            data = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, start, (nbytes,), (1,))
            record = self._records[key] = SavedStorage(data, self._number, transfers, self._dead)
            buffer = self._pool.allocate(nbytes)
            if buffer is None:
                self._stats.bytes_kept += nbytes
                return record
            record.buffer = buffer
            record.saved = transfers.save(data, self._pool.parts(buffer))
            if not transfers.asynchronous:
                record.let_go()
            self._stats.bytes_offloaded += nbytes
        elif record.buffer:
            self._stats.deduplicated += 1
        self._stats.tensors += bool(record.buffer)
        return record

    def _on_device(self, record: SavedStorage, due: int) -> torch.Tensor:
        """A record's bytes on the device, brought back if they have left."""
        if record.data is None:
            if record.bring_back(self._pool.parts(record.buffer)):
                self._stats.bytes_restored += record.nbytes
            self._hold(record, due)
        assert record.data is not None
        return record.data

    def _prefetch(self, number: int) -> None:
        """Brings back what was saved before the saved tensor of this number, while the window has room."""
        for earlier in range(number - 1, max(number - 1 - LOOKAHEAD, 0), -1):
            saved = self._saved.get(earlier)
            record = None if saved is None else saved.record
            if saved is None or record is None or record.data is not None or saved.epoch == record.epoch:
                continue
            if self._window_bytes + record.nbytes > self._limit:
                return
            self._on_device(record, earlier)

    def _transfers_of(self, device: torch.device) -> Transfers | None:
        """The copies of a device's tensors, which the first tensor decides on; None where they stay there."""
        if self._device is None and device.type in DEVICES:
            self._device = device
        if device != self._device:
            if not self._any_device:
                return None
            raise RuntimeError(
                f"offload_activations: saved tensors must be on {self._device or ' or '.join(DEVICES)}, as the first "
                f"one was, got one on {device}; make a new offload_activations for a module that has moved, or pass "
                "device= to offload the tensors of one device only"
            )
        if self._transfers is None:
            self._transfers = transfers_for(device, self._pool.pinned)
        return self._transfers

    def _hold(self, record: SavedStorage, due: int) -> None:
        """Takes a record into the window, that backward needs when it comes to the saved tensor of a number."""
        self._forget(record.number)
        self._window[record.number] = due, record.nbytes, weakref.ref(record)
        self._window_bytes += record.nbytes

    def _forget(self, number: int) -> None:
        """Takes a record out of the window, if it is there."""
        self._window_bytes -= self._window.pop(number, (0, 0))[1]

    def _shrink(self) -> None:
        """Lets go what backward needs last, until the rest of the window is within its limit."""
        while self._window_bytes > self._limit:
            number = min(self._window, key=lambda number: self._window[number][0])
            record = self._window[number][2]()
            if record is not None:
                record.let_go()
            self._forget(number)

    def _collect(self) -> None:
        """Takes back the buffers of records that are gone."""
        while self._dead:
            number, buffer = self._dead.popleft()
            self._forget(number)
            self._pool.free(buffer)
