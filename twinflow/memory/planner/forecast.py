"""`Forecast`: what a step is predicted to take."""

from dataclasses import dataclass, field

from twinflow.memory.planner.costs import Cost
from twinflow.memory.planner.gpus import CONTEXT_BYTES
from twinflow.memory.planner.workload import Workload
from twinflow.memory.presets import MemoryPreset

SPARE = 0.01  # share of a card that a step leaves free
PARTS = (
    "weights", "adapters", "optimizer", "ema", "gradients", "step", "saved", "transient", "workspace", "encoders",
)  # fmt: skip
LABELS = {
    "weights": "weights", "adapters": "adapters, conditioning", "optimizer": "optimizer states", "ema": "EMA",
    "gradients": "gradients", "step": "latents, noise, targets", "saved": "saved activations",
    "transient": "transient", "workspace": "kernels' workspace", "encoders": "text encoders",
    "context": "CUDA context",
}  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """Bytes at a step's peak, split, and its least time.

    Args:
        workload, preset: what was asked.
        bytes: part of `PARTS` -> bytes; they sum to the peak.
        where: what runs at the peak.
        cost: of the whole step on the card, None where none was asked for.
        offloaded_bytes, deferred_bytes: pinned host memory that activations move to, and of modulation weights.
        label: for tables, where it is not the preset's name.
    """

    workload: Workload
    preset: MemoryPreset
    bytes: dict[str, int]
    where: str
    cost: Cost | None = None
    offloaded_bytes: int = 0
    deferred_bytes: int = 0
    label: str = field(default="")

    @property
    def peak(self) -> int:
        """`torch.cuda.max_memory_allocated()` after some steps, bytes."""
        return sum(self.bytes.values())

    @property
    def host_bytes(self) -> int:
        """Pinned host memory."""
        return self.offloaded_bytes + self.deferred_bytes

    @property
    def device(self) -> int:
        """The peak with the CUDA context, bytes."""
        return self.peak + CONTEXT_BYTES

    @property
    def name(self) -> str:
        """The label, or the preset's name."""
        return self.label or self.preset.name

    @property
    def needed(self) -> float:
        """What the allocator must be able to hand out, bytes: a little more than the peak."""
        return self.peak / (1 - SPARE)

    def fits(self, usable_gb: float) -> bool:
        """Whether it runs within the GB (1e9 bytes) that the allocator can hand out."""
        return self.needed <= usable_gb * 1e9
