"""`peer_forecasts()`: what a user would otherwise run, by the same accounting as our own steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from twinflow.memory.planner.costs import Cost, CostOf
from twinflow.memory.planner.forecast import Forecast, Planner, peak_parts
from twinflow.memory.planner.gpus import GPU
from twinflow.memory.planner.peers.networks import PeerRun, frozen_copy, width_of
from twinflow.memory.planner.peers.steps import Heads, dmd2_step, sana_sprint_step
from twinflow.memory.planner.simulation.meta_student import as_trained, meta_network
from twinflow.memory.planner.simulation.shortened_model import ShortenedModel, shorten
from twinflow.memory.planner.simulation.static_memory import TRAFFIC, static_memory
from twinflow.memory.planner.simulation.timeline import splice
from twinflow.memory.planner.workload import Workload
from twinflow.memory.presets import MemoryPreset
from twinflow.models import FlowModel

WHOLE_BATCH = MemoryPreset("peer", "input", None)


@dataclass(frozen=True)
class _Peer:
    label: str
    networks: dict[str, FlowModel]
    step: Callable[[PeerRun], None]
    heads: nn.Module | None = None

    def modules(self) -> list[nn.Module]:
        return [*self.networks.values(), *([] if self.heads is None else [self.heads])]


def peer_forecasts(workload: Workload, gpu: GPU | None = None, whole: bool = False) -> list[Forecast]:
    """Forecasts of what a user would otherwise run: the whole batch at once, every block checkpointed.

    - `published schedule`: TwinFlow by the published code's calls, its text encoders resident.
    - `dmd2`: generator, fake score and real score, each with a base of its own, the first two trained; a step has one
      update of each of them, where the published settings have five to ten of the fake score.
    - `sana-sprint`: student and frozen teacher. The consistency target's derivative runs in forward mode, for which
      attention makes its scores: in float32, as torch's own form does. Gradients of the student's two graphs that
      autograd has yet to add count as saved activations.

    Optimizer and adapters are the workload's. The last two keep no average, no encoder and no conditioning of ours;
    what else their steps leave out is said at `dmd2_step` and `sana_sprint_step`, and would only add to them.

    Args:
        gpu: the card whose speed times are for; None: no times.
        whole: run every block instead of three of each kind.

    Returns:
        Labelled forecasts in this order; of a quantised base without `sana-sprint`, as products with it have no
        derivative in forward mode.

    Source: TwinFlow (arXiv 2512.05150), DMD2 (arXiv 2405.14867), SANA-Sprint (arXiv 2503.09641).
    """
    reduction = shorten(workload.architecture, WHOLE_BATCH, whole)
    published = Planner(workload, gpu, whole).forecast(WHOLE_BATCH, "published")
    encoders = {"encoders": int(workload.architecture.text_encoder_gb * 1e9)}
    found = [replace(published, label="published schedule", bytes={**published.bytes, **encoders})]
    makers = [_dmd2] if workload.base in ("int8", "nf4") else [_dmd2, _sana_sprint]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return found + [_forecast(workload, make(workload, reduction), reduction, gpu) for make in makers]


def _trained(workload: Workload, reduction: ShortenedModel) -> FlowModel:
    return as_trained(meta_network(reduction.architecture, workload.base), workload, None)


def _dmd2(workload: Workload, reduction: ShortenedModel) -> _Peer:
    """The frozen score is in bf16 where the trained ones are in float32, as the published code has it."""
    base = "bfloat16" if workload.base == "float32" else workload.base
    networks = {
        "generator": _trained(workload, reduction),
        "fake score": _trained(workload, reduction),
        "real score": frozen_copy(reduction.architecture, base),
    }
    return _Peer("dmd2", networks, dmd2_step)


def _sana_sprint(workload: Workload, reduction: ShortenedModel) -> _Peer:
    student, teacher = _trained(workload, reduction), frozen_copy(reduction.architecture, workload.base)
    heads = Heads(width_of(teacher), teacher.dtype)
    return _Peer("sana-sprint", {"student": student, "teacher": teacher}, sana_sprint_step, heads)


def _forecast(workload: Workload, peer: _Peer, reduction: ShortenedModel, gpu: GPU | None) -> Forecast:
    run = PeerRun(workload, peer.networks, peer.heads, None if gpu is None else CostOf(gpu))
    run.run(peer.step)
    peak, costs = splice(run.regions, reduction.repeats)
    held = [static_memory(module, None, workload.optimizer, reduction) for module in peer.modules()]
    total = None
    if gpu is not None:
        moved = TRAFFIC[workload.optimizer] * sum(one.trained for one in held)
        total = sum(costs.values(), Cost(0, moved, moved / (gpu.memory_gb_s * 1e9)))
    return Forecast(workload, WHOLE_BATCH, peak_parts(peak, held), peak.where, total, label=peer.label)
