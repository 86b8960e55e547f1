"""`Forecast`: what a step is predicted to take."""

from dataclasses import dataclass, field

from twinflow.memory.planner.costs import Cost
from twinflow.memory.planner.gpus import CONTEXT_BYTES
from twinflow.memory.planner.workload import Workload
from twinflow.memory.presets import MemoryPreset

PARTS = (
    "weights", "adapters", "optimizer", "ema", "gradients", "step", "saved", "transient", "workspace", "encoders",
)  # fmt: skip
SAYS = {
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
        host_bytes: pinned memory that activations move to.
        label: for tables, where it is not the preset's name.
    """

    workload: Workload
    preset: MemoryPreset
    bytes: dict[str, int]
    where: str
    cost: Cost | None = None
    host_bytes: int = 0
    label: str = field(default="")

    @property
    def peak(self) -> int:
        """`torch.cuda.max_memory_allocated()` after some steps, bytes."""
        return sum(self.bytes.values())

    @property
    def device(self) -> int:
        """The peak with the CUDA context, bytes."""
        return self.peak + CONTEXT_BYTES

    @property
    def name(self) -> str:
        """The label, or the preset's name."""
        return self.label or self.preset.name

    def fits(self, usable_gb: float) -> bool:
        """Whether the peak is within the GB (1e9 bytes) that the allocator can hand out."""
        return self.peak <= usable_gb * 1e9
