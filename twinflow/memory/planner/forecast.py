"""`Planner` and its `Forecast`: what a training step will take, without a GPU and without weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from twinflow.errors import require
from twinflow.memory.offload.activations import window_bytes
from twinflow.memory.planner.costs import Cost, CostOf
from twinflow.memory.planner.gpus import CONTEXT_BYTES, GPU
from twinflow.memory.planner.simulation.deferral import SWEEP, applicable, obstacle
from twinflow.memory.planner.simulation.meta_student import META, meta_student, meta_teacher
from twinflow.memory.planner.simulation.run import StepSimulation, worst_draws
from twinflow.memory.planner.simulation.shortened_model import ShortenedModel, shorten
from twinflow.memory.planner.simulation.static_memory import TRAFFIC, StaticMemory, static_memory
from twinflow.memory.planner.simulation.storage_tracker import StorageTracker
from twinflow.memory.planner.simulation.timeline import Peak, splice
from twinflow.memory.planner.workload import Workload
from twinflow.memory.presets import MemoryPreset
from twinflow.models import FlowModel
from twinflow.objective.loss import TwinFlowLoss
from twinflow.teachers.teachers import EMATeacher, StudentTeacher

CUBLAS_BYTES = 2 * 4 * 2**20 + 8 * 16 * 2**10  # one handle's workspace, as torch allocates it
_MICRO_BATCHES = 4  # of a step that are run: one of each role, the gradients there from the second on
_DRAWN = 64  # steps whose rows are averaged for the time
SPARE = 0.01  # share of a card that a step leaves free
LABELS = {
    "weights": "weights", "adapters": "adapters, conditioning", "optimizer": "optimizer states", "ema": "EMA",
    "gradients": "gradients", "step": "latents, noise, targets", "saved": "saved activations",
    "transient": "transient", "workspace": "kernels' workspace", "encoders": "text encoders",
    "context": "CUDA context",
}  # fmt: skip
PARTS = tuple(LABELS)[:-1]  # of a peak, which is without the context


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


@dataclass(frozen=True)
class _Model:
    reduction: ShortenedModel
    student: FlowModel
    teacher: EMATeacher
    deferred: dict[str, nn.Module]

    @property
    def deferred_bytes(self) -> int:
        """Of the deferred layers, at full depth."""
        return sum(
            sum(p.numel() * p.element_size() for p in layer.parameters()) * self.reduction.times(name)
            for name, layer in self.deferred.items()
        )


class Planner:
    """Forecasts steps of one workload.

    Args:
        gpu: the card whose speed times are for; None: no times.
        whole: run every block instead of three of each kind: minutes instead of seconds, for the same result.
    """

    def __init__(self, workload: Workload, gpu: GPU | None = None, whole: bool = False) -> None:
        self.workload, self._gpu, self._whole = workload, gpu, whole
        self._models: dict[tuple, _Model] = {}

    @cached_property
    def presets(self) -> dict[str, MemoryPreset]:
        """Those of `PRESETS` that apply, the fastest first."""
        return applicable(self.workload)

    def forecast(self, preset: MemoryPreset, schedule: str = "planned") -> Forecast:
        """The peak and the least time of a step; the same on every call, and torch's random state stays.

        Args:
            schedule: `planned` or `published`.

        Raises:
            ValueError: the preset does not apply, or has levels for another number of blocks.
        """
        reason = obstacle(self.workload, preset)
        require(reason is None, "plan", "preset", "one that applies", f"{preset.name!r}, {reason}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._forecast(preset, schedule)

    def _forecast(self, preset: MemoryPreset, schedule: str) -> Forecast:
        workload, model = self.workload.under(preset), self._model(preset)
        rows = workload.batch
        if preset.micro_batch is not None and schedule == "planned":
            rows = min(rows, _MICRO_BATCHES * preset.micro_batch)
        cost = None if self._gpu is None else CostOf(self._gpu)
        simulation = StepSimulation(workload, preset, model.student, model.teacher, model.reduction, cost)
        draws = worst_draws(workload, rows)
        simulation.run(draws, schedule)
        peak, costs = splice(simulation.regions, model.reduction.repeats)
        held = static_memory(model.student, model.teacher, workload.optimizer, model.reduction, model.deferred.values())
        resident = self._resident(workload.batch, preset) - self._resident(rows, preset) if rows < workload.batch else 0
        sweeps, waiting = (d.sweeps, d.waiting()) if (d := simulation.deferral) is not None else (0, 0)
        resident += waiting * (workload.batch - rows) // rows
        host = peak.most_notes.get("host", 0)
        total = None
        if cost is not None:
            total = self._step_cost(costs, draws, schedule, sweeps * model.deferred_bytes)
            total = total + self._update_cost(held, workload.optimizer)
        return Forecast(
            self.workload, preset, peak_parts(peak, [held], resident, host, preset.offload_gb), peak.where, total,
            offloaded_bytes=min(host, int(preset.offload_gb * 1e9)), deferred_bytes=model.deferred_bytes,
        )  # fmt: skip

    def _model(self, preset: MemoryPreset) -> _Model:
        """The small model; presets whose blocks are all alike share one, on each base."""
        key = () if isinstance(preset.saved, str) else preset.saved, preset.base, preset.defer
        if key not in self._models:
            reduction = shorten(self.workload.architecture, preset, self._whole)
            student = meta_student(self.workload.under(preset), reduction.architecture, preset.defer)
            self._models[key] = _Model(
                reduction, student, meta_teacher(student), student.modulation_layers() if preset.defer else {}
            )
        model = self._models[key]
        return replace(model, reduction=shorten(self.workload.architecture, preset, self._whole))

    def _resident(self, rows: int, preset: MemoryPreset) -> int:
        """Bytes of the step's own tensors when the last piece goes backward, with a network that holds nothing."""
        workload, found = self.workload, []
        scale = torch.ones((), device=META, dtype=torch.bfloat16, requires_grad=True)
        latents = torch.empty(rows, *workload.latent, device=META, dtype=torch.bfloat16)
        draws = worst_draws(workload, rows)

        def network(x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: object) -> torch.Tensor:
            return x_t * scale

        def backward(loss: torch.Tensor) -> None:
            found.append(live.live)
            loss.backward()

        with StorageTracker() as live:
            live.watch((latents, draws.z, draws.z_fake, draws.z_rectify))
            TwinFlowLoss(workload.config).backward(
                network, latents, latents, latents[:1], micro_batch=preset.micro_batch or rows, draws=draws,
                teacher=StudentTeacher(network), backward=backward,
            )  # fmt: skip
        live.close()
        return found[-1] + rows * self._condition_bytes

    @cached_property
    def _condition_bytes(self) -> int:
        """Of one row's condition, bf16."""
        model = next(iter(self._models.values()))
        widths = model.student.condition_widths()
        return sum(2 * width * (self.workload.tokens if key == "prompt_embeds" else 1) for key, width in widths.items())

    def _step_cost(self, costs: dict[str, Cost], draws: object, schedule: str, streamed: int) -> Cost:
        """Rows of an average step at the cost of the simulated ones; deferred weights take their transfer's time.

        Args:
            costs: by region of the simulated step.
            streamed: bytes of weights that pass from the host.
        """
        assert self._gpu is not None
        workload = self.workload
        criterion = TwinFlowLoss(workload.config)
        ran = criterion.plan(draws, schedule=schedule)  # type: ignore[arg-type]
        latents = torch.empty(workload.batch, *workload.latent, device=META)
        plans = [criterion.plan(criterion.draw(latents), schedule=schedule) for _ in range(_DRAWN)]
        without = sum(p.rows_without_gradient for p in plans) / _DRAWN / max(ran.rows_without_gradient, 1)
        with_gradient = sum(p.rows_with_gradient for p in plans) / _DRAWN / max(ran.rows_with_gradient, 1)
        passing = costs.pop(SWEEP, Cost()) * with_gradient
        total = costs.pop("without gradient", Cost()) * without + passing
        for cost in costs.values():
            total = total + cost * with_gradient
        # Products with one layer's weights run while the next one's are on their way.
        return total + Cost(seconds=max(streamed / (self._gpu.host_gb_s * 1e9) - passing.seconds, 0.0))

    def _update_cost(self, held: StaticMemory, optimizer: str) -> Cost:
        """Of the optimizer, and of the average, which moves 12 bytes a parameter."""
        assert self._gpu is not None
        moved = (TRAFFIC[optimizer] + 12) * held.trained
        return Cost(0, moved, moved / (self._gpu.memory_gb_s * 1e9))


def peak_parts(
    peak: Peak, held: Sequence[StaticMemory], resident: int = 0, host: int = 0, offload_gb: float = 0.0
) -> dict[str, int]:
    """The peak's bytes, split.

    Args:
        held: at all times.
        resident: of the step's own tensors, of rows that did not run.
        host: bytes of activations that would move to the host.
        offload_gb: what may move there, GB.
    """
    gradients, step = peak.notes["gradients"], peak.notes["step"]
    saved, budget = max(peak.start - gradients - step, 0), int(offload_gb * 1e9)
    at_all_times = {n: sum(getattr(one, n) for one in held) for n in ("weights", "adapters", "optimizer", "ema")}
    return at_all_times | {
        "gradients": gradients, "step": step + resident,
        "saved": saved + max(host - budget, 0),  # what finds no room stays
        "transient": peak.total - peak.workspace - gradients - step - saved + min(window_bytes(budget), host),
        "workspace": peak.workspace + CUBLAS_BYTES,
    }  # fmt: skip
