"""`Planner`: forecasts of a workload under presets, without a GPU and without weights."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from twinflow.loss import TwinFlowLoss
from twinflow.memory.offload import window_bytes
from twinflow.memory.planner.costs import Cost, CostOf
from twinflow.memory.planner.forecast import Forecast
from twinflow.memory.planner.gpus import GPU
from twinflow.memory.planner.live import LiveStorages
from twinflow.memory.planner.meta_student import META, meta_student, meta_teacher
from twinflow.memory.planner.reduction import Reduction, reduce
from twinflow.memory.planner.simulation import StepSimulation, worst_draws
from twinflow.memory.planner.standing import Standing, standing
from twinflow.memory.planner.timeline import splice
from twinflow.memory.planner.workload import Workload
from twinflow.memory.presets import MemoryPreset
from twinflow.models import FlowModel
from twinflow.teacher import EMATeacher, StudentTeacher

CUBLAS_BYTES = 2 * 4 * 2**20 + 8 * 16 * 2**10  # one handle's workspace, as torch allocates it
_PIECES = 4  # pieces of a step that are run: one of each role, the gradients there from the second on
_DRAWN = 64  # steps whose rows are averaged for the time


@dataclass(frozen=True)
class _Model:
    reduction: Reduction
    student: FlowModel
    teacher: EMATeacher
    standing: Standing


class Planner:
    """Forecasts steps of one workload.

    Args:
        workload: what is trained.
        gpu: the card whose speed times are for; None: no times.
        whole: run every block instead of three of each kind: minutes instead of seconds, for the same result.
    """

    def __init__(self, workload: Workload, gpu: GPU | None = None, whole: bool = False) -> None:
        self.workload, self._gpu, self._whole = workload, gpu, whole
        self._models: dict[tuple, _Model] = {}

    def forecast(self, preset: MemoryPreset, schedule: str = "planned") -> Forecast:
        """The peak and the least time of a step; the same on every call, and torch's random state stays.

        Args:
            preset: how it is run.
            schedule: `planned` or `published`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._forecast(preset, schedule)

    def _forecast(self, preset: MemoryPreset, schedule: str) -> Forecast:
        workload, model = self.workload, self._model(preset)
        rows = workload.batch
        if preset.micro_batch is not None and schedule == "planned":
            rows = min(rows, _PIECES * preset.micro_batch)
        cost = None if self._gpu is None else CostOf(self._gpu)
        simulation = StepSimulation(workload, preset, model.student, model.teacher, model.reduction, cost)
        draws = worst_draws(workload, rows)
        simulation.run(draws, schedule)
        peak, costs = splice(simulation.regions, model.reduction.repeats)
        resident = self._resident(workload.batch, preset) - self._resident(rows, preset) if rows < workload.batch else 0
        gradients, step = peak.notes["gradients"], peak.notes["step"]
        held = model.standing
        parts = {
            "weights": held.weights, "adapters": held.adapters, "optimizer": held.optimizer, "ema": held.ema,
            "gradients": gradients, "step": step + resident, "saved": max(peak.start - gradients - step, 0),
        }  # fmt: skip
        parts["transient"] = peak.total - peak.workspace - gradients - step - parts["saved"]
        parts["workspace"] = peak.workspace + CUBLAS_BYTES
        host = peak.most_notes.get("host", 0)
        budget = int(preset.offload_gb * 1e9)
        parts["saved"] += max(host - budget, 0)  # what finds no room stays
        parts["transient"] += min(window_bytes(budget), host)
        where = peak.name + (f", {peak.block}" if peak.block else "")
        total = None if cost is None else self._step_cost(costs, draws, schedule, held)
        return Forecast(workload, preset, parts, where, total, min(host, budget))

    def _model(self, preset: MemoryPreset) -> _Model:
        """The small model; presets whose blocks are all alike share one."""
        key = () if isinstance(preset.saved, str) else preset.saved
        if key not in self._models:
            reduction = reduce(self.workload.architecture, preset, self._whole)
            student = meta_student(self.workload, reduction.architecture)
            teacher = meta_teacher(student)
            held = standing(student, teacher, self.workload.optimizer, reduction)
            self._models = {key: _Model(reduction, student, teacher, held)}
        model = self._models[key]
        return replace(model, reduction=reduce(self.workload.architecture, preset, self._whole))

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

        with LiveStorages() as live:
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

    def _step_cost(self, costs: dict[str, Cost], draws: object, schedule: str, held: Standing) -> Cost:
        """Rows of an average step at the cost of the simulated ones, the optimizer and the average."""
        workload = self.workload
        criterion = TwinFlowLoss(workload.config)
        ran = criterion.plan(draws, schedule=schedule)  # type: ignore[arg-type]
        latents = torch.empty(workload.batch, *workload.latent, device=META)
        plans = [criterion.plan(criterion.draw(latents), schedule=schedule) for _ in range(_DRAWN)]
        without = sum(p.rows_without_gradient for p in plans) / _DRAWN / max(ran.rows_without_gradient, 1)
        with_gradient = sum(p.rows_with_gradient for p in plans) / _DRAWN / max(ran.rows_with_gradient, 1)
        total = costs.pop("without gradient", Cost()) * without
        for cost in costs.values():
            total = total + cost * with_gradient
        assert self._gpu is not None
        moved = 28 * held.trained + 12 * held.trained  # AdamW reads 16 and writes 12 bytes, the average moves 12
        return total + Cost(0, moved, moved / (self._gpu.memory_gb_s * 1e9))
