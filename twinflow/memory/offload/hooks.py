"""`OffloadHooks`: the pack and unpack hooks of `offload_activations`."""

import threading
import weakref
from collections import deque
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from twinflow.memory.offload.host_pool import Extent, HostPool, Transfers, transfers_for
from twinflow.memory.offload.records import SavedStorage, SavedTensor, UntouchedTensor, Window, stays, stretch

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


class OffloadHooks:
    """What autograd calls; it does not know the object that has it, so that no cycle keeps the pool.

    Args:
        pool: where copies go.
        device: whose tensors to offload; None: that of the first.
        min_bytes: storages smaller than this stay on the device.
        pin_memory: whether the pool of a CUDA device is pinned.
        window: holds the records that are on their way.
    """

    def __init__(
        self, pool: HostPool, device: torch.device | None, min_bytes: int, pin_memory: bool, window: Window
    ) -> None:
        self._pool, self._device, self._any_device = pool, device, device is None
        self._min_bytes, self._pin_memory, self._window = min_bytes, pin_memory, window
        self._stats, self._number = OffloadStats(), 0
        self._transfers: Transfers | None = None
        self._records: weakref.WeakValueDictionary[tuple, SavedStorage] = weakref.WeakValueDictionary()
        self._saved: weakref.WeakValueDictionary[int, SavedTensor] = weakref.WeakValueDictionary()
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._owned: dict[int, StorageWeakRef] = {}
        self._dead: deque[tuple[int, tuple[Extent, ...]]] = deque()
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

    def pack(self, tensor: torch.Tensor) -> SavedTensor | UntouchedTensor:
        """Takes what autograd saves."""
        if stays(tensor, self._min_bytes) or tensor.untyped_storage()._cdata in self._owned:
            return UntouchedTensor(tensor)
        with self._lock:
            transfers = self._transfers_of(tensor.device)
            if transfers is None:
                return UntouchedTensor(tensor)
            self._collect()
            self._number += 1
            record = self._record_of(tensor, transfers)
            saved = self._saved[self._number] = SavedTensor(tensor, record, self._number)
            record.users.append(weakref.ref(saved))
            if record.extents and record.data is not None:
                self._window.add(record, saved.number)
                self._window.shrink()
            return saved

    def unpack(self, saved: SavedTensor | UntouchedTensor) -> torch.Tensor:
        """Gives back what autograd saved.

        Raises:
            RuntimeError: it was modified in place since.
        """
        saved.check()
        if isinstance(saved, UntouchedTensor):
            return saved.tensor
        with self._lock:
            self._collect()
            record = saved.record
            data = self._on_device(record, saved.number)
            record.wait()
            saved.epoch = record.epoch
            if record.extents and record.is_used_up():
                record.let_go()
                record.epoch += 1
                self._window.discard(record.number)
            self._window.shrink()
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
            extents = self._pool.allocate(nbytes)
            if extents is None:
                self._stats.bytes_kept += nbytes
                return record
            record.extents = extents
            record.saved = transfers.save(data, self._pool.parts(extents, nbytes))
            if not transfers.asynchronous:
                record.let_go()
            self._stats.bytes_offloaded += nbytes
        elif record.extents:
            self._stats.deduplicated += 1
        self._stats.tensors += bool(record.extents)
        return record

    def _on_device(self, record: SavedStorage, saved: int) -> torch.Tensor:
        """A record's bytes on the device, brought back if they have left."""
        if record.data is None:
            if not record.revive():
                record.load(self._pool.parts(record.extents, record.nbytes))
                self._stats.bytes_restored += record.nbytes
            self._window.add(record, saved)
        assert record.data is not None
        return record.data

    def _prefetch(self, number: int) -> None:
        """Brings back what was saved before the saved tensor of this number, while the window has room."""
        for earlier in range(number - 1, max(number - 1 - LOOKAHEAD, 0), -1):
            saved = self._saved.get(earlier)
            if saved is None or saved.record.data is not None or saved.epoch == saved.record.epoch:
                continue
            if self._window.nbytes + saved.record.nbytes > self._window.limit:
                return
            self._on_device(saved.record, earlier)

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
            if device.type != "meta":
                self._pool.take_memory(pinned=self._pin_memory and device.type == "cuda")
            self._transfers = transfers_for(device, self._pin_memory)
        return self._transfers

    def _collect(self) -> None:
        """Takes back the buffers of records that are gone."""
        while self._dead:
            number, extents = self._dead.popleft()
            self._window.discard(number)
            self._pool.free(extents)
