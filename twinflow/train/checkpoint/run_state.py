"""`RunState`: all that a run needs to go on as if it had never stopped."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from twinflow.distributed import check_on_all_ranks, gather_bytes, unwrap, world
from twinflow.interface import Teacher, trained_parameters
from twinflow.objective.loss import TwinFlowLoss
from twinflow.train.checkpoint.optimizer_state import check_optimizer, collect_optimizer, kind_of, load_optimizer
from twinflow.train.checkpoint.random_streams import check_streams, collect_streams, put_streams
from twinflow.train.checkpoint.state_checks import check_form, check_names, check_tensor, placed, snapshot
from twinflow.train.checkpoint.state_tree import decode, encode


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
        shared, own = tree["shared"], tree["ranks"][world()[0]]
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
        shared, pieces = tree["shared"], tree["ranks"]
        parts = dict.fromkeys(("student", "teacher", "criterion", "optimizer", "scheduler"))
        check_names(shared, parts, "state")
        if not isinstance(pieces, list) or len(pieces) != ranks:
            count = len(pieces) if isinstance(pieces, list) else 0
            raise ValueError(f"restore: the run must have as many processes as it was saved with, {count}, got {ranks}")
        own = pieces[rank]
        check_names(own, dict.fromkeys(("streams", "batches", "extra")), "state")
        self._check_shared(shared)
        if not isinstance(own["extra"], dict):
            raise ValueError(f"restore: extra must be a dict, got {type(own['extra']).__name__} in the checkpoint")
        check_streams(own["streams"], self.generators)
        if (own["batches"] is None) != (self.batches is None):
            raise ValueError("restore: batches must be there where their position was saved, and only there")

    def _check_shared(self, shared: dict[str, Any]) -> None:
        trained = self._trained()
        check_names(shared["student"], trained, "student")
        for name, parameter in trained.items():
            check_tensor(shared["student"][name], parameter.shape, parameter.dtype, f"student {name}")
        for name in ("teacher", "criterion", "scheduler"):
            _check_part(shared[name], getattr(self, name), name)
        if (shared["optimizer"] is None) != (self.optimizer is None):
            raise ValueError("restore: optimizer must be there where one was saved, and only there")
        if self.optimizer is not None:
            check_optimizer(shared["optimizer"], self.optimizer, trained)


def _described(part: Any) -> Any:
    return None if part is None else {"kind": kind_of(part), "state": part.state_dict()}


def _check_part(saved: Any, part: Any, name: str) -> None:
    mine = _described(part)
    if saved is None or mine is None:
        if saved is not mine:
            raise ValueError(f"restore: {name} must be there where one was saved, and only there")
        return
    check_names(saved, mine, name)
    if saved["kind"] != mine["kind"]:
        raise ValueError(f"restore: {name} must be {mine['kind']}, got {str(saved['kind'])[:80]} in the checkpoint")
    check_form(saved["state"], mine["state"], name)


def _from_all_ranks(own: dict[str, Any]) -> list[Any]:
    """Every rank's piece, on every rank."""
    if world()[1] == 1:
        return [own]
    from safetensors.torch import load, save

    tensors, text = encode(own)
    texts = gather_bytes(text.encode())
    return [decode(load(data), text) for data, text in zip(gather_bytes(save(tensors)), texts, strict=True)]
