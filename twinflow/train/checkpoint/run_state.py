"""`RunState`: all that a run needs to go on as if it had never stopped."""

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from twinflow.distributed import check_on_all_ranks, gather_bytes, unwrap, world
from twinflow.errors import ArgumentError, require
from twinflow.interface import Teacher, trained_parameters
from twinflow.objective.loss import TwinFlowLoss
from twinflow.train.checkpoint.optimizer_state import check_optimizer, collect_optimizer, kind_of, load_optimizer
from twinflow.train.checkpoint.state_checks import (
    check_form,
    check_names,
    check_tensor,
    placed,
    plain_state,
    require_saved,
    snapshot,
)
from twinflow.train.checkpoint.state_tree import decode, encode

_NUMPY_WORDS = 624


@dataclass
class RunState:
    """The parts of a run that change while it trains; collect them between optimizer steps, gradients are not kept.

    Of the student its trainable parameters are kept: the base, packed or deferred or as it is, comes from where the
    run got it, and buffers are taken for constants. Random streams, generators, the position in the data and `extra`
    are each rank's own; everything else is the same on all ranks, sharded tensors in whole.

    Args:
        student: wrapped or not.
        teacher, criterion, optimizer, scheduler: None where the run has none; the optimizer's states are of the
            shape of their parameters, as those of AdamW, RAdam and 8-bit AdamW are.
        generators: name -> generator.
        batches: the data, with `state_dict()` and `load_state_dict()`; None: it needs no position.
        extra: plain values, such as numbers of steps; restored in place.
    """

    student: nn.Module
    teacher: Teacher | None = None
    criterion: TwinFlowLoss | None = None
    optimizer: torch.optim.Optimizer | None = None
    scheduler: Any = None
    generators: dict[str, torch.Generator] = field(default_factory=dict)
    batches: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    def collect(self) -> dict[str, Any]:
        """A copy of the state in host memory, as a tree for `write_checkpoint`; every rank must call it.

        Returns:
            The tree; on ranks but 0 without its tensors.

        Raises:
            ValueError: the optimizer trains something else than the student, or keeps sharded 8-bit states.
        """
        rank, _ = world()
        own = {
            "streams": collect_streams(self.generators),
            "batches": None if self.batches is None else self.batches.state_dict(),
            "extra": self.extra,
        }
        return {"shared": snapshot(self._shared(), keep=rank == 0), "ranks": _from_all_ranks(snapshot(own))}

    def restore(self, tree: Any) -> None:
        """Continues from a collected state; every rank must call it, with the whole tree.

        Raises:
            ValueError: the state is of another model, rank of adapters, optimizer or number of processes; the message
                names the difference, and nothing has been changed.
        """
        check_on_all_ranks("restore", lambda: self._check(tree))
        shared, own = plain_state(tree["shared"]), tree["ranks"][world()[0]]
        if self.batches is not None:
            self.batches.load_state_dict(own["batches"])
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(placed(shared["student"][name], parameter.detach()))
        for part, saved in ((self.teacher, shared["teacher"]), (self.criterion, shared["criterion"])):
            if part is not None:
                part.load_state_dict(placed(saved["state"], part.state_dict()))
        if self.optimizer is not None:
            load_optimizer(shared["optimizer"], self.optimizer)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(placed(shared["scheduler"]["state"], self.scheduler.state_dict()))
        self.extra.clear()
        self.extra.update(snapshot(own["extra"]))
        put_streams(own["streams"], self.generators)

    def _trained(self) -> dict[str, nn.Parameter]:
        module = unwrap(self.student)
        assert isinstance(module, nn.Module)
        return trained_parameters(module)

    def _shared(self) -> dict[str, Any]:
        trained = self._trained()
        return {
            "student": dict(trained),
            "teacher": _described(self.teacher),
            "criterion": _described(self.criterion),
            "optimizer": None if self.optimizer is None else collect_optimizer(self.optimizer, trained),
            "scheduler": _described(self.scheduler),
        }

    def _check(self, tree: Any) -> None:
        rank, ranks = world()
        check_names(tree, {"shared": 0, "ranks": 0}, "state")
        shared, pieces = plain_state(tree["shared"]), tree["ranks"]
        parts = dict.fromkeys(("student", "teacher", "criterion", "optimizer", "scheduler"))
        check_names(shared, parts, "state")
        count = len(pieces) if isinstance(pieces, list) else 0
        wanted = f"as many processes as it was saved with, {count}"
        require(count == ranks, "restore", "the run", wanted, ranks, verb="have")
        own = pieces[rank]
        check_names(own, dict.fromkeys(("streams", "batches", "extra")), "state")
        self._check_shared(shared)
        require_saved(isinstance(own["extra"], dict), "extra", "a dict", type(own["extra"]).__name__)
        check_streams(own["streams"], self.generators)
        _check_presence(own["batches"], self.batches, "batches")

    def _check_shared(self, shared: dict[str, Any]) -> None:
        trained = self._trained()
        check_names(shared["student"], trained, "student")
        for name, parameter in trained.items():
            check_tensor(shared["student"][name], parameter.shape, parameter.dtype, f"student {name}")
        for name in ("teacher", "criterion", "scheduler"):
            _check_part(shared[name], getattr(self, name), name)
        _check_presence(shared["optimizer"], self.optimizer, "optimizer")
        if self.optimizer is not None:
            check_optimizer(shared["optimizer"], self.optimizer, trained)


def _described(part: Any) -> Any:
    return None if part is None else {"kind": kind_of(part), "state": part.state_dict()}


def _check_presence(saved: Any, part: Any, name: str) -> None:
    got = "one there alone" if part is None else "none"
    require_saved((saved is None) == (part is None), name, "there where it was saved, and only there", got)


def _check_part(saved: Any, part: Any, name: str) -> None:
    _check_presence(saved, part, name)
    if part is not None:
        check_part(saved, part, name)


def check_part(saved: Any, part: Any, name: str) -> None:
    """Raises ArgumentError unless a saved part is one that this part can load."""
    mine = _described(part)
    check_names(saved, mine, name)
    require_saved(saved["kind"] == mine["kind"], name, mine["kind"], str(saved["kind"])[:80])
    check_form(saved["state"], mine["state"], name)


def _from_all_ranks(own: dict[str, Any]) -> list[Any]:
    """Every rank's piece, on every rank."""
    if world()[1] == 1:
        return [own]
    from safetensors.torch import load, save

    tensors, text = encode(own)
    texts = gather_bytes(text.encode())
    return [decode(load(data), text) for data, text in zip(gather_bytes(save(tensors)), texts, strict=True)]


def collect_streams(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """Where all streams stand; of CUDA's that of the current device."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
    }


def check_streams(saved: Any, generators: Mapping[str, torch.Generator]) -> None:
    """Raises ArgumentError unless these are states that the streams take; tried on others."""
    check_names(saved, dict.fromkeys(("torch", "cuda", "python", "numpy", "generators")), "random")
    check_names(saved["generators"], dict(generators), "generators")
    states: list[tuple[str, Any, Any]] = [("torch", "cpu", saved["torch"])]
    states += [(f"generators[{name!r}]", g.device, saved["generators"][name]) for name, g in generators.items()]
    if saved["cuda"] is not None and torch.cuda.is_available():
        states.append(("cuda", "cuda", saved["cuda"]))
    for name, device, state in states:
        _try(name, lambda device=device, state=state: torch.Generator(device).set_state(state))
    _try("python", lambda: random.Random().setstate(saved["python"]))
    _try("numpy", lambda: _check_numpy(saved["numpy"]))


def put_streams(saved: dict[str, Any], generators: Mapping[str, torch.Generator]) -> None:
    """Continues from checked states."""
    for name, generator in generators.items():
        generator.set_state(saved["generators"][name].clone())
    torch.set_rng_state(saved["torch"].clone())
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"].clone())
    elif saved["cuda"] is not None:
        warnings.warn("restore: the run was saved on a GPU and goes on without; its steps will differ", stacklevel=3)
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])


def _try(name: str, change: Any) -> None:
    try:
        change()
    except Exception as error:  # each library refuses in its own way
        got = f"a refusal: {error}"
        raise ArgumentError("restore", f"random stream {name}", "its saved state", got, verb="take") from None


def _check_numpy(state: Any) -> None:
    key, position = np.asarray(state["state"]["key"]), state["state"]["pos"]
    check_tensor(torch.from_numpy(key.copy()), (_NUMPY_WORDS,), torch.uint32, "numpy")
    if type(position) is not int or not 0 <= position <= _NUMPY_WORDS:  # numpy would read past its memory
        raise ValueError(f"position {position}")
    np.random.RandomState().set_state(state)
