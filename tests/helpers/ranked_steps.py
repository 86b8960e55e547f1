"""Steps of a run of a tiny SD3 on one process or on several, each with its part of the same rows and draws."""

import gc
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.batches import EIGHT, rows_of, toy_draws
from helpers.family_batches import make_batch, spread
from helpers.tiny_pipelines import saved_pipeline
from torch import distributed

from twinflow import TwinFlowConfig, TwinFlowLoss
from twinflow.distributed import data_parallel, unwrap, world
from twinflow.interface import trained_parameters
from twinflow.memory import apply_memory
from twinflow.memory.blocks import repeated_blocks
from twinflow.train.checkpoint.run_state import RunState
from twinflow.train.config.resolve import read_config
from twinflow.train.config.settings import TrainSettings
from twinflow.train.model.optimizer import build_optimizer
from twinflow.train.model.parallel import clip, wrap
from twinflow.train.model.student import build_student

CONFIG = TwinFlowConfig(delta_t=0.5)
# Roles of a step's two micro-batches of four rows; the halves of two ranks differ in their calls.
MICRO = (("e2e", "mul", "any", "adv"), EIGHT[4:])


def settings_of(**more) -> TrainSettings:
    given = {"pretrained_model_name_or_path": str(saved_pipeline("sd3")), "twinflow_enabled": True, "use_ema": True,
             "ema_decay": 0.9, "mixed_precision": "no", "learning_rate": 1e-3, "adam_epsilon": 1e-3, "lora_rank": 2,
             "max_grad_norm": 0.01, "memory_preset": "batch"}  # fmt: skip
    return read_config(None, given | more)


@dataclass
class Run:
    """A run's parts, in the order in which a loop makes them."""

    settings: TrainSettings
    accelerator: Accelerator
    seed: int = 5
    backend: Callable | None = None  # of compiled blocks

    def __post_init__(self) -> None:
        model = build_student(self.settings, saved_pipeline("sd3"))
        torch.manual_seed(self.seed)
        self.model = spread(model)
        memory = apply_memory(model, self.settings.memory_preset)
        if self.backend is not None:
            for block in repeated_blocks(model.network).values():
                block.compile(backend=self.backend)
        self.student, self.teacher = wrap(self.settings, model, self.accelerator, memory.preset)
        trained = trained_parameters(unwrap(self.student))
        self.optimizer = build_optimizer(self.settings, trained.values(), memory)
        self.criterion = TwinFlowLoss(CONFIG)
        self.extra: dict = {"losses": [], "norms": []}
        self.state = RunState(self.student, self.teacher, self.criterion, self.optimizer, extra=self.extra)

    def backward(self, number: int, roles: tuple[str, ...], rows: slice, step_rows: int, first: bool) -> torch.Tensor:
        """Gradients of some rows of a micro-batch, all of which is the same on every rank."""
        torch.manual_seed(number)
        batch = make_batch("sd3", self.model, len(roles))
        draws = rows_of(toy_draws(CONFIG, batch[0], roles), rows.start, rows.stop)
        mine = [batch[0][rows], *({name: leaf[rows] for name, leaf in cond.items()} for cond in batch[1:])]
        return self.criterion.backward(
            self.student, *mine, teacher=self.teacher, draws=draws, step_rows=step_rows, update_teacher=first
        ).loss

    def advance(self, steps: int) -> "Run":
        rank, ranks = world()
        share = 4 // ranks
        for _ in range(steps):
            loss, done = 0.0, len(self.extra["losses"])
            for number, roles in enumerate(MICRO):
                rows, wrapper = slice(rank * share, (rank + 1) * share), data_parallel(self.student)
                if wrapper is not None:
                    wrapper.require_backward_grad_sync = number == 1
                loss += float(self.backward(2 * done + number, roles, rows, 2 * share, number == 0))
            norm = clip([p for g in self.optimizer.param_groups for p in g["params"]], self.settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.extra["losses"].append(loss)
            self.extra["norms"].append(float(norm))
        return self


def one_process(settings: TrainSettings, steps: int = 3) -> dict:
    """What the whole batch gives, as `RunState` collects it."""
    return Run(settings, Accelerator(cpu=True)).advance(steps).state.collect()


def assert_same_run(found: dict, expected: dict, tolerance: float = 1e-4) -> None:
    """Losses, norms, weights and averages of a run on two ranks and of one process."""
    for name in ("losses", "norms"):
        means = torch.tensor([piece["extra"][name] for piece in found["ranks"]]).mean(0)
        torch.testing.assert_close(means, torch.tensor(expected["ranks"][0]["extra"][name]), rtol=tolerance, atol=0)
    mine, whole = found["shared"], expected["shared"]
    averages = (mine["teacher"]["state"].pop("shadow"), whole["teacher"]["state"].pop("shadow"))
    assert mine["teacher"]["state"] == whole["teacher"]["state"] and whole["teacher"]["state"]["updates"] == 3
    for weights, wanted in ((mine["student"], whole["student"]), averages):
        assert weights.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=2e-6)
    moved = max((whole["student"][name] - value).abs().max() for name, value in averages[1].items())
    assert moved > 1e-4, "the average is another than the student"


def on_two_ranks(kind: str, work: Callable, *arguments: object, seconds: int = 90) -> None:
    """Runs `work(accelerator, *arguments)` in two forks, as of a launcher; fails where they wait for each other.

    Args:
        kind: `ddp` or `fsdp2`.
        work, arguments: what they do.
        seconds: at most.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    given = (port, kind, work, arguments)
    context = mp.start_processes(_child, given, nprocs=2, join=False, start_method="fork")
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks wait for each other")


def _child(rank: int, port: int, kind: str, work: Callable, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    if kind == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # that of earlier tests
    work(Accelerator(cpu=True), *arguments)
    gc.collect()  # DDP's wrapper before the group that it uses
    distributed.destroy_process_group()
