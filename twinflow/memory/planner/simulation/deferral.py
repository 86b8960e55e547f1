"""Deferred modulation and quantised bases in forecasts: which presets apply, and a deferral on the meta device."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from twinflow.memory.planner.architectures import Architecture
from twinflow.memory.planner.simulation.meta_student import META, meta_network
from twinflow.memory.planner.simulation.shortened_model import ShortenedModel, shorten
from twinflow.memory.planner.workload import Workload
from twinflow.memory.presets import PRESETS, MemoryPreset
from twinflow.models import FlowModel
from twinflow.objective.plan import NetworkCall

SWEEP = "modulation"  # name of the regions in which the weights pass


def applicable(workload: Workload) -> dict[str, MemoryPreset]:
    """Those of `PRESETS` that apply to a workload, in their order."""
    return {name: preset for name, preset in PRESETS.items() if obstacle(workload, preset) is None}


def obstacle(workload: Workload, preset: MemoryPreset) -> str | None:
    """Why a workload cannot be run so; None: it can be."""
    if (preset.defer or preset.base is not None) and workload.lora_rank is None:
        return "which is for a LoRA on a frozen base, not for all weights"
    if preset.base is not None and workload.base not in ("bfloat16", preset.base):
        return f"which quantises a bfloat16 base, not one of {workload.base}"
    return _deferral_obstacle(workload) if preset.defer else None


def _deferral_obstacle(workload: Workload) -> str | None:
    name = workload.architecture.name
    if not workload.deferrable or workload.architecture.config.get("zero_cond_t"):
        return f"which defers modulation: that of {name} cannot be"
    layers = modulation_sizes(workload.architecture)
    if not layers:
        return f"which defers modulation: {name} has no layers for it"
    targets = workload.lora_targets or ()
    adapted = [layer for layer in layers if any(f".{layer}".endswith(f".{target}") for target in targets)]
    return f"which defers modulation: the LoRA is on {adapted[0]}" if adapted else None


def modulation_sizes(architecture: Architecture) -> dict[str, int]:
    """Name of a layer of the reduced model -> parameters of all that it stands for."""
    reduction = shorten(architecture, PRESETS["checkpoint"])
    layers = meta_network(reduction.architecture, "bfloat16").modulation_layers()
    return {name: sum(p.numel() for p in layer.parameters()) * reduction.times(name) for name, layer in layers.items()}


class SimulatedDeferral:
    """A student's modulation, deferred on the meta device as on a card, with the carriers of the whole model.

    Args:
        student: with as many blocks as `reduction` says.
        reduction: which blocks stand for several.
        mark: begins a region of the timeline: its name, and the block it belongs to.

    Attributes:
        rehearsing: whether the student is run up to its time embedding only.
        sweeps: how often the weights have passed.
    """

    def __init__(
        self,
        stack: ExitStack,
        student: FlowModel,
        reduction: ShortenedModel,
        mark: Callable[[str, str | None], None],
        live: Callable[[], int],
    ) -> None:
        from twinflow.memory.modulation.defer import defer_modulation

        self.rehearsing, self.sweeps, self._mark, self._live = False, 0, mark, live
        self._rows, self._graphs = 0, 0  # of calls from the first with a graph on; bytes of embeddings and their graphs
        handle = defer_modulation(student, device=META)
        stack.callback(handle.remove)
        more = [
            slot.count * (reduction.times(n) - 1) for n, slot in zip(handle.layers, handle.table.slots, strict=True)
        ]
        handle.table.units += sum(more)
        self._row_bytes = handle.row_bytes
        self._blocks = [next((b for b in reduction.levels if n.startswith(f"{b}.")), None) for n in handle.layers]
        self._rehearsal, self._sweep = handle.rehearsal, handle._weights.sweep
        handle.rehearsal, handle._weights.sweep = self._rehearsed, self._marked  # type: ignore[method-assign]

    def waiting(self) -> int:
        """Bytes that the step's rows hold while one is differentiated, at most: vectors or their gradients, graphs."""
        return self._rows * self._row_bytes + self._graphs

    @contextmanager
    def _rehearsed(self, by_micro_batch: bool) -> Iterator[Callable[[NetworkCall], None]]:
        before, self.rehearsing = self._live(), True
        with self._rehearsal(by_micro_batch) as announce:

            def told(call: NetworkCall) -> None:
                self._rows += len(call.rows) if self._rows or call.gradient else 0
                announce(call)

            yield told
            self.rehearsing, self._graphs = False, self._live() - before

    def _marked(self, reverse: bool = False) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """Each layer's turn is its block's, so that it is repeated as often."""
        self.sweeps += 1
        for number, *parameters in self._sweep(reverse):
            self._mark(SWEEP, self._blocks[number])
            yield number, *parameters  # type: ignore[misc]
        self._mark("backward" if reverse else "between", None)
