"""Runs, trees and child processes for the tests of checkpoints."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers.batches import COND, DIM, toy_batch
from helpers.family_batches import make_batch, make_student
from helpers.memory_cases import student_of
from helpers.toy import ToyNet
from torch import nn

from twinflow import EMATeacher, TwinFlowLoss
from twinflow.lora import add_lora
from twinflow.memory.adamw_8bit import adamw_8bit
from twinflow.train.checkpoint.checkpoint import read_checkpoint
from twinflow.train.checkpoint.run_state import RunState
from twinflow.train.logging.metrics_file import each_line


class Metrics(NamedTuple):
    """What a `metrics.jsonl` holds: its records in order, and how many lines are damaged."""

    records: list[dict[str, Any]]
    damaged: int


def read_metrics(path: Path) -> Metrics:
    read = [record for _, record in each_line(path)]
    return Metrics([record for record in read if record is not None], read.count(None))


def tree_of(step: int) -> dict:
    return {"step": step, "weights": {"a": torch.full((3, 5), float(step)), "b": torch.arange(step)}}


def holds(path: Path, step: int) -> bool:
    found = read_checkpoint(path)
    expected = tree_of(step)["weights"]
    return found["step"] == step and all(torch.equal(found["weights"][name], expected[name]) for name in expected)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".checkpoints.lock")


def in_a_fork(work: Callable[[], None]) -> int:
    """Exit status of a child: 0, 9 where `work` ended it itself, 1 where it raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Position:
    """Where a run is in its data."""

    def __init__(self) -> None:
        self.at = 0

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = int(state["at"])


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "bitsandbytes": lambda p: adamw_8bit(p, lr=1e-2, library="bitsandbytes"),
    "torchao": lambda p: adamw_8bit(p, lr=1e-2, library="torchao"),
}


class Run:
    """A run with everything in it: two micro-batches a step, a warm-up, an average, all random streams."""

    def __init__(self, student: nn.Module, optimizer: str, make_rows: Callable[[], tuple]) -> None:
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        self.student, self.make_rows = student, make_rows
        self.teacher, self.criterion = EMATeacher(student, 0.9), TwinFlowLoss()
        self.optimizer = OPTIMIZERS[optimizer]([p for p in student.parameters() if p.requires_grad])
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 5))
        self.generator, self.batches = torch.Generator().manual_seed(3), Position()
        self.progress: dict = {"step": 0, "losses": []}
        self.state = RunState(
            student, self.teacher, self.criterion, self.optimizer, self.scheduler, {"draws": self.generator},
            self.batches, self.progress,
        )  # fmt: skip

    def advance(self, steps: int) -> "Run":
        for _ in range(steps):
            total = random.random() + np.random.rand()
            for micro in range(2):
                with torch.random.fork_rng():
                    torch.manual_seed(self.batches.at)
                    rows = self.make_rows()
                self.batches.at += 1
                out = self.criterion.backward(
                    self.student, *rows, teacher=self.teacher, generator=self.generator,
                    step_rows=2 * len(rows[0]), update_teacher=micro == 0,
                )  # fmt: skip
                total += float(out.loss)
            total += float(torch.rand(()))
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.progress["step"] += 1
            self.progress["losses"].append(total)
        return self


def sd3_run(lora: bool, optimizer: str, preset: str | None = None, seed: int = 0, rank: int = 2) -> Run:
    """A run of a tiny SD3, its trainable weights from a seed."""
    from twinflow.memory import apply_memory

    student = student_of("sd3", lora) if rank == 2 else add_lora(make_student("sd3"), rank, conditioning="dual+sign")
    if preset is not None:
        apply_memory(student, preset)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 50)
    return Run(student, optimizer, lambda: make_batch("sd3", student, 2))


def toy_run(seed: int = 0, optimizer: str = "adamw", width: int = DIM) -> Run:
    """A run of the toy network, with dropout."""
    torch.manual_seed(seed)
    return Run(ToyNet(width, COND, dropout=0.1), optimizer, lambda: toy_batch(2))
