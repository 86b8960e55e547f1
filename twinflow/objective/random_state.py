"""`StepRandomState`: where torch's global random streams stand in each network call of a step.

Every call of a micro-batch starts from the same state, so that dropout masks agree between student and teacher;
afterwards the streams stand where the first student call left them.
"""

import hashlib
from typing import NamedTuple

import torch


class _Streams(NamedTuple):
    cpu: torch.Tensor
    device: torch.Tensor | None


class StepRandomState:
    """The random states of one step.

    Args:
        device: the device of the latents; its stream is kept beside the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._capture()
        self._left: _Streams | None = None
        self._micro_batches = {0: self._start}

    def before_call(self, micro_batch: int) -> None:
        """Puts the streams at the state of a micro-batch.

        Args:
            micro_batch: its number; number 0 starts where the step started, the others at states derived from it.
        """
        if micro_batch not in self._micro_batches:
            self._micro_batches[micro_batch] = self._derive(micro_batch)
        self._restore(self._micro_batches[micro_batch])

    def after_student_call(self) -> None:
        """Remembers where the first differentiated call left the streams."""
        if self._left is None:
            self._left = self._capture()

    def finish(self) -> None:
        """Leaves the streams where the first student call left them, or where the step started if there was none."""
        self._restore(self._left or self._start)

    def _capture(self) -> _Streams:
        device = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return _Streams(torch.get_rng_state(), device)

    def _restore(self, streams: _Streams) -> None:
        torch.set_rng_state(streams.cpu)
        if streams.device is not None:
            torch.cuda.set_rng_state(streams.device, self._device)

    def _derive(self, micro_batch: int) -> _Streams:
        """A state for a micro-batch: seeded by a hash of the starting state and the micro-batch's number."""
        digest = hashlib.blake2b(micro_batch.to_bytes(8, "little"), digest_size=8)
        for stream in self._start:
            digest.update(b"" if stream is None else stream.numpy().tobytes())
        seed = int.from_bytes(digest.digest(), "little") >> 1
        device = None
        if self._start.device is not None:
            device = torch.Generator(self._device).manual_seed(seed).get_state()
        return _Streams(torch.Generator().manual_seed(seed).get_state(), device)
