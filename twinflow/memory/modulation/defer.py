"""`defer_modulation()`: a step's modulation vectors all at its beginning, from weights that stay in host memory."""

import functools
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from twinflow.distributed import unwrap
from twinflow.errors import ArgumentError, ArgumentTypeError, require
from twinflow.memory.blocks import Attached, replace_forward
from twinflow.memory.modulation.layers import activation_before, deferrable_layers
from twinflow.memory.modulation.step import DeferredStep, Entry, connect
from twinflow.memory.modulation.streamed_weights import StreamedWeights
from twinflow.memory.modulation.table import ModulationTable, Slot
from twinflow.models import FlowModel
from twinflow.objective.plan import NetworkCall, Plan

DEVICES = ("cuda", "cpu")
_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks for names
_ALONE = NetworkCall("call", "student", (0,), (("main", 1),), (0.0,), (0.0,))  # a call outside of a step


class DeferredModulation(Attached):
    """What `defer_modulation` attached to a model.

    Attributes:
        layers: name within the network -> layer, in order of execution.
        device: where they are computed.
        host_bytes: of their parameters.
        row_bytes: of the vectors of one row of one call, on the device.
        active: until it is removed.
    """

    def __init__(
        self, student: FlowModel, layers: dict[str, nn.Linear], device: torch.device, pin_memory: bool
    ) -> None:
        super().__init__([])
        self.layers, self.device = layers, device
        self._student = student
        network = student.network
        silus = [activation_before(network, name) for name in layers]
        # Their own forwards, before they are replaced.
        applied = [nn.Identity() if silu is None else silu.forward for silu in silus]
        weights = StreamedWeights(list(layers.values()), device, pin_memory)
        self._weights = weights
        self.host_bytes = weights.nbytes
        self.table = ModulationTable(list(layers.values()), applied, weights)
        self.active = True
        self._step: DeferredStep | None = None
        self._announced: NetworkCall | None = None
        self._captured = 0
        assert student.modulation is not None
        source = network.get_submodule(student.modulation.source)
        self._removals.append(source.register_forward_hook(torch.compiler.disable(self._embedded)).remove)
        for layer, slot in zip(layers.values(), self.table.slots, strict=True):
            units = torch.arange(slot.first, slot.first + slot.count, device=device)
            self._removals.append(replace_forward(layer, _sliced(slot, units, self._is_active)))
        for silu in silus:
            if silu is not None:
                self._removals.append(replace_forward(silu, _passed_on(self._is_active)))
        dtypes = {parameter.dtype for parameter in student.parameters()}
        for module in {id(m): m for m in (student, student.transformer, network, *layers.values())}.values():
            self._removals.append(_refuse_moves(module, device, dtypes, self._is_active))
        self._removals.append(_hide_from_ddp(student, [p for layer in layers.values() for p in layer.parameters()]))
        student.deferral = self
        self._removals.append(functools.partial(setattr, student, "deferral", None))

    def __deepcopy__(self, memo: object) -> "DeferredModulation":
        """A copy of the model, as a teacher's, takes its vectors from here."""
        return self

    @property
    def row_bytes(self) -> int:
        return self.table.units * self.table.unit * next(iter(self.layers.values())).weight.element_size()

    def remove(self) -> None:
        """Leaves the model as it was, weights where they were, copies of it too; a second call does nothing.

        A model that came from the CPU has its modulation there again: move it as a whole.
        """
        self._weights.bring_back()
        self.active = False
        super().remove()

    def __str__(self) -> str:
        return (
            f"modulation deferred: {len(self.layers)} layers, {self.host_bytes / 1e9:.2f} GB in host memory, "
            f"{self.row_bytes / 1e6:.2f} MB a row on {self.device}"
        )

    # What FlowModel calls.

    def begin_step(self, plan: Plan) -> None:
        """A step begins.

        Raises:
            ValueError: the layers have been changed since.
        """
        network = self._student.network
        for name, layer in self.layers.items():
            if network.get_submodule(name) is not layer or layer.weight.requires_grad:
                hint = "remove() the deferral first"
                raise ArgumentError("defer_modulation", name, "frozen and without adapter", "it changed", hint, "stay")
        self._step = DeferredStep(self.table, plan)

    @contextmanager
    def rehearsal(self, by_micro_batch: bool) -> Iterator[Callable[[NetworkCall], None]]:
        """Collects the time embeddings of a step's calls, and computes their vectors at its end."""
        step = self._step
        assert step is not None
        try:
            yield self._announce
            self._announce(None)
        finally:
            self._announced = None
        step.compute(by_micro_batch)

    def call(self, velocity: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Calls the network, or runs it up to its time embedding where the step is rehearsed."""
        if self._announced is None:
            return velocity()
        try:
            return velocity()
        except _Embedded:
            return torch.zeros_like(like)

    def end_step(self) -> None:
        """Ends the step."""
        step, self._step = self._step, None
        if step is not None and sys.exc_info()[0] is None:
            step.settle()

    def _announce(self, call: NetworkCall | None) -> None:
        if self._announced is not None and not self._captured:
            wanted, hint = "the deferred model or a copy made since", "make the teacher after deferring"
            raise ArgumentError("defer_modulation", f"the {self._announced.who}", wanted, "another", hint)
        self._announced, self._captured = call, 0

    def _embedded(self, source: nn.Module, args: Any, embedding: torch.Tensor) -> torch.Tensor:
        """Hook of the time embedding: its modulation in its place."""
        step = self._step
        if not self.active:  # of a copy that outlived it
            return embedding
        if self._announced is not None:
            assert step is not None
            step.entries.append(Entry(self._announced, embedding))
            self._captured += 1
            raise _Embedded
        if step is not None and step.ready:
            return step.take(embedding)
        entry = Entry(_ALONE, embedding, self.table.carriers([embedding.detach()])[0])
        if embedding.requires_grad and torch.is_grad_enabled():
            connect(self.table, [[entry]])
        assert entry.carrier is not None
        return entry.carrier

    def _is_active(self) -> bool:
        return self.active


class _Embedded(Exception):
    """Ends a rehearsed call."""


def defer_modulation(
    student: nn.Module, *, device: torch.device | str | None = None, pin_memory: bool = True
) -> DeferredModulation:
    """Keeps the weights of a frozen model's modulation (AdaLN) in host memory, where steps need them twice.

    A third of Qwen-Image's weights make modulation vectors, six for each block and stream, from one time embedding a
    row. `TwinFlowLoss` knows all times when a step begins: its calls are rehearsed up to their time embedding, the
    weights pass through the device once, and every call finds its vectors. In backward the vectors' gradients are
    gathered, and the weights pass once more when the last row is differentiated, if something trained lies upstream.
    Results and gradients are those of the model without this, bit for bit where products of a shape repeat theirs.
    Outside of a step the model works too: each call passes the weights once.

    Attach it after adapters and conditioning are added, before a teacher is made that copies the module.

    Args:
        student: from `twinflow.models.load`, in DDP's wrapper or not; its modulation layers are frozen.
        device: where the model computes, and moves to: the rest of it alone, layer by layer; None: where it is.
        pin_memory: False: pageable host memory, whose copies are synchronous and about 2-4x slower.

    Returns:
        The handle that removes it.

    Raises:
        TypeError: not a `FlowModel`.
        ValueError: a family without modulation layers, trained or adapted or quantised ones, deferred ones, a sharded
            model, an unknown device, or a host with too little memory.
        RuntimeError: the system does not let as much memory be pinned.
    """
    model = unwrap(student)
    if not isinstance(model, FlowModel):
        raise ArgumentTypeError("defer_modulation", "student", "from twinflow.models.load", type(model).__name__)
    where, fresh = _checked_device(model, device), model.deferral is None
    require(fresh, "defer_modulation", "student", "without it yet", "one that is deferred", "remove() that first")
    layers = deferrable_layers(model)
    attached = DeferredModulation(model, layers, where, pin_memory)
    try:
        _bring_rest(model, set(layers.values()), where)
    except BaseException:
        attached.remove()
        raise
    return attached


def _checked_device(model: FlowModel, device: torch.device | str | None) -> torch.device:
    here = next(model.parameters()).device
    found = here if device is None else torch.device(device)
    known, wanted = found.type in DEVICES or found == here, f"{' or '.join(DEVICES)} where the student has data"
    require(known, "defer_modulation", "device", wanted, found)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _bring_rest(model: nn.Module, deferred: set[nn.Linear], device: torch.device) -> None:
    """Moves all but the deferred layers to a device; parameters stay the same objects."""
    for module in model.modules():
        if module in deferred:
            continue
        for held in [*module._parameters.values(), *module._buffers.values()]:
            if held is not None and held.device != device and held.device.type != "meta":
                held.data = held.data.to(device)


def _sliced(slot: Slot, units: torch.Tensor, active: Callable[[], bool]) -> Callable[..., torch.Tensor]:
    """A modulation layer's forward: its part of the carrier that comes in the embedding's place.

    Args:
        slot: which part.
        units: the same on the device.
        active: says whether a carrier comes; else, as in a copy that outlived the deferral, the layer does its own.
    """

    def forward(module: nn.Module, carrier: torch.Tensor) -> torch.Tensor:
        if not active():
            return type(module).forward(module, carrier)
        if torch.compiler.is_compiling():  # places as data: blocks that are alike are compiled once
            return carrier.index_select(1, units).flatten(1)
        return carrier.narrow(1, slot.first, slot.count).flatten(1)

    return forward


def _passed_on(active: Callable[[], bool]) -> Callable[..., torch.Tensor]:
    """The forward of an activation before modulation layers, which has been applied already."""

    def forward(module: nn.Module, carrier: torch.Tensor) -> torch.Tensor:
        return carrier if active() else type(module).forward(module, carrier)

    return forward


def _refuse_moves(
    module: nn.Module, device: torch.device, dtypes: Collection[torch.dtype], active: Callable[[], bool]
) -> Callable[[], None]:
    """Makes a module refuse to be moved or cast; what would change nothing, as `to` its own device, does nothing.

    Args:
        active: says whether it still must; a copy of the module asks too.

    Returns:
        What undoes it.
    """

    def stay(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if not active():
            return type(module)._apply(module, change, recurse)
        for dtype in dtypes:
            before = torch.empty(0, dtype=dtype, device=device)
            after = change(before)
            if (after.device, after.dtype) != (before.device, before.dtype):
                raise RuntimeError(
                    f"defer_modulation: the model must stay on {device} and in its dtype while its modulation is "
                    f"deferred, got a change to {after.dtype} on {after.device}; remove() the deferral first"
                )
        return module

    module.__dict__["_apply"] = MethodType(stay, module)
    return functools.partial(module.__dict__.pop, "_apply", None)


def _hide_from_ddp(module: nn.Module, parameters: Collection[torch.Tensor]) -> Callable[[], None]:
    """Makes DDP's wrapper pass over frozen parameters on another device than the rest; returns what undoes it."""
    hidden = {id(parameter) for parameter in parameters}
    names = [name for name, parameter in module.named_parameters() if id(parameter) in hidden]
    before = list(getattr(module, _IGNORED, ()))
    module.__dict__[_IGNORED] = before + names

    def undo() -> None:
        del module.__dict__[_IGNORED]
        if before:
            module.__dict__[_IGNORED] = before

    return undo
