"""`StepSimulation`: a planned step on the meta device, followed storage by storage."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from twinflow.memory.blocks import repeated_blocks, replace_forward
from twinflow.memory.offload.activations import offload_activations
from twinflow.memory.planner.simulation.autocast import MetaAutocast
from twinflow.memory.planner.simulation.deferral import SimulatedDeferral
from twinflow.memory.planner.simulation.fused_attention import fused_attention, workspace
from twinflow.memory.planner.simulation.meta_student import META, random_condition
from twinflow.memory.planner.simulation.shortened_model import ShortenedModel
from twinflow.memory.planner.simulation.storage_tracker import Cost, StorageTracker, aligned, tensors
from twinflow.memory.planner.simulation.timeline import Region
from twinflow.memory.planner.workload import Workload
from twinflow.memory.presets import MemoryPreset
from twinflow.memory.recompute import selective_recompute
from twinflow.models import FlowModel
from twinflow.objective.draws import Draws, draw_step
from twinflow.objective.loss import TwinFlowLoss
from twinflow.teachers.teachers import EMATeacher

# The row with most to hold comes last, when every gradient is there: rectification runs while its graph is held.
WORST_LAST = ("mul", "any", "adv", "e2e")


class Simulation:
    """A run on the meta device, followed storage by storage in regions.

    Args:
        modules: whose gradients are counted.
        cost: of an operation; None: not summed.

    Attributes:
        regions: the timeline of the last run, with bytes of gradients, of the step's own tensors and on the host noted.
    """

    def __init__(self, workload: Workload, modules: Iterable[nn.Module], cost: Cost | None) -> None:
        self.workload, self._cost = workload, cost
        self._trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        self._autocast = MetaAutocast() if workload.base == "float32" else None
        self._holding = False  # whether a graph is held
        self._step_bytes = 0
        self._offload: offload_activations | None = None
        self.regions: list[Region] = []

    @contextmanager
    def _following(self, live: StorageTracker, stack: ExitStack, attach: Callable[[ExitStack], None]) -> Iterator[None]:
        """Runs what is inside as a GPU would, with what `attach` puts on the networks, and keeps its regions."""
        self._live = live
        with stack:
            stack.callback(self._release)
            attach(stack)
            for context in (fused_attention(), self._autocast, live):
                if context is not None:
                    stack.enter_context(context)
            yield
            self._mark("between")
        self.regions = live.regions

    @contextmanager
    def _calling(self, name: str, network: bool = True) -> Iterator[None]:
        """A call; before a network's, without a graph, all that lives is the step's own."""
        if network and not self._holding:
            self._step_bytes = self._live.live - self._gradients()
        self._mark(name)
        with nullcontext() if self._autocast is None else self._autocast.cached():
            yield
        self._mark("between")

    def backward(self, loss: torch.Tensor) -> None:
        """Adds gradients to `.grad` of everything that is trained."""
        self._mark("backward")
        loss.backward()
        self._holding = False
        self._mark("between")

    def _release(self) -> None:
        self._live.close()
        for parameter in self._trained:
            parameter.grad = None

    def _mark(self, name: str, block: str | None = None) -> None:
        self._live.mark(name, block)
        moved = 0 if self._offload is None else self._offload.stats.pool_bytes
        self._live.regions[-1].notes = {"gradients": self._gradients(), "step": self._step_bytes, "host": moved}

    def _gradients(self) -> int:
        return sum(aligned(p.grad.untyped_storage().nbytes()) for p in self._trained if p.grad is not None)


class StepSimulation(Simulation):
    """Runs a student's step; names of regions are `without gradient`, `forward`, `backward`, `between`, `modulation`.

    Args:
        student, teacher: on the meta device, with as many blocks as `reduction` says.
        reduction: which blocks stand for several.
        window: device bytes for offloaded tensors on their way; without any, every block does alike.

    Attributes:
        deferral: of the last run; None: none.
    """

    def __init__(
        self,
        workload: Workload,
        preset: MemoryPreset,
        student: FlowModel,
        teacher: EMATeacher,
        reduction: ShortenedModel,
        cost: Cost | None = None,
        window: int = 0,
    ) -> None:
        super().__init__(workload, [student], cost)
        self.preset, self.student, self.teacher, self._window = preset, student, teacher, window
        self._reduction = reduction
        self.deferral: SimulatedDeferral | None = None

    def run(self, draws: Draws, schedule: str = "planned") -> None:
        """One step, forward and backward.

        Args:
            draws: of the step; their number of rows is its batch.
            schedule: `planned` or `published`.
        """
        latents = torch.empty(len(draws.t), *self.workload.latent, device=META, dtype=torch.bfloat16)
        cond, uncond = (random_condition(self.student, n, self.workload.tokens) for n in (len(draws.t), 1))
        live, micro_batch = StorageTracker(workspace, self._cost), self.preset.micro_batch
        with _no_collections(), self._following(live, ExitStack(), self._attach):
            live.watch((latents, cond, uncond, draws.z, draws.z_fake, draws.z_rectify))
            criterion = TwinFlowLoss(self.workload.config)
            arguments: dict[str, Any] = dict(teacher=self.teacher, draws=draws)
            if schedule == "published" or micro_batch is None:
                loss = criterion(self.student, latents, cond, uncond, schedule=schedule, **arguments).loss
                self.backward(loss)
                del loss
            else:
                arguments |= dict(micro_batch=micro_batch, backward=self.backward)
                criterion.backward(self.student, latents, cond, uncond, **arguments)

    def _attach(self, stack: ExitStack) -> None:
        """The preset's mechanisms, and marks around networks and blocks."""
        if self.preset.defer:
            self.deferral = SimulatedDeferral(stack, self.student, self._reduction, self._mark, lambda: self._live.live)
        blocks = repeated_blocks(self.student.network)
        levels = [self._reduction.levels.get(name, "input") for name in blocks]
        if set(levels) != {"all"}:
            stack.callback(selective_recompute(self.student.network, levels).remove)
        if self.preset.offload_gb:
            self._offload = offload_activations(
                budget_gb=self.preset.offload_gb, device=META, in_flight_bytes=self._window
            )
            stack.callback(self._offload.attach(self.student).remove)
        module = getattr(self.teacher._weights, "module", None)
        for network in [self.student] if module is None else [self.student, module]:
            for name, block in repeated_blocks(network.network).items():
                mark_block(stack, self._mark, name, block)
            self._mark_network(stack, network)

    def _mark_network(self, stack: ExitStack, network: nn.Module) -> None:
        inner: Callable[..., torch.Tensor] = network.forward

        def forward(_network: nn.Module, *args: Any) -> torch.Tensor:
            if self.deferral is not None and self.deferral.rehearsing:
                return inner(*args)
            graded = torch.is_grad_enabled()
            with self._calling("forward" if graded else "without gradient"):
                self._holding = self._holding or graded
                return inner(*args)

        stack.callback(replace_forward(network, forward))


def mark_block(stack: ExitStack, mark: Callable[[str, str], None], name: str, block: nn.Module) -> None:
    """Begins a region whenever a block is called or its backward begins, for as long as the stack stays open.

    Args:
        mark: called with `forward`, `without gradient` or `backward`, and the block's name.
    """

    def before(module: nn.Module, args: Any) -> None:
        # It ends where the next block begins: only then has the caller let go of this one's inputs.
        mark("forward" if torch.is_grad_enabled() else "without gradient", name)

    def after(module: nn.Module, args: Any, outputs: Any) -> None:
        entered: list[bool] = []

        def enter(grad: torch.Tensor) -> None:
            if not entered:
                entered.append(True)
                mark("backward", name)

        for output in tensors(outputs):
            if output.requires_grad:
                output.register_hook(enter)

    stack.callback(block.register_forward_pre_hook(before).remove)
    stack.callback(block.register_forward_hook(after).remove)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keeps Python from collecting cycles, whose time depends on all that has run before."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def worst_draws(workload: Workload, rows: int) -> Draws:
    """Draws of a step of some rows, the one with most to hold last."""
    roles = None
    if workload.recipe == "partition":
        roles = tuple(WORST_LAST[(i - rows) % len(WORST_LAST)] for i in range(rows))
    latents = torch.empty(rows, *workload.latent, device=META, dtype=torch.bfloat16)
    return draw_step(workload.config, latents, roles, None, 0)
