"""`build_optimizer()`, `warm_up()`, `renew()`: what moves the weights, and how fast."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from twinflow.memory import AppliedMemory, adamw_8bit
from twinflow.train.config.settings import TrainSettings


def build_optimizer(
    settings: TrainSettings, parameters: Iterable[torch.nn.Parameter], memory: AppliedMemory, saved: str | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a run; where the memory preset counts on 8-bit AdamW, that in plain AdamW's place.

    A run keeps the kind that it began with: another preset may count on another.

    Args:
        parameters: what is trained, on its device.
        memory: what was applied.
        saved: kind in the checkpoint that the run goes on from, see `saved_kind`; None: it begins.

    Raises:
        ImportError: the library of an 8-bit optimizer is missing.
    """
    trained: Sequence[torch.nn.Parameter] = list(parameters)
    how = _settings(settings)
    if settings.optimizer == "radam":
        return torch.optim.RAdam(trained, decoupled_weight_decay=True, **how)
    if settings.optimizer == "adamw8bit" or (saved or "").endswith("AdamW8bit"):
        return adamw_8bit(trained, **how)
    if saved is not None:
        return torch.optim.AdamW(trained, fused=True, **how)
    return memory.adamw(trained, **how)


def saved_kind(state: Any) -> str | None:
    """The kind of the optimizer in the state of a checkpoint; None where there is none."""
    saved = state["shared"]["optimizer"] if isinstance(state, dict) and isinstance(state.get("shared"), dict) else None
    kind = saved.get("kind") if isinstance(saved, dict) else None
    return kind if isinstance(kind, str) else None


def warm_up(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """A schedule that reaches the learning rate after some steps, in equal parts, and stays there."""
    return LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / max(steps, 1)))


def renew(settings: TrainSettings, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
    """Puts a run's settings in the place of those that a checkpoint brought; equal ones change no bit.

    Args:
        settings: of the run as it goes on.
        optimizer: restored.
        scheduler: of `warm_up`, restored.
    """
    wanted = _settings(settings)
    rate = wanted.pop("lr")
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group.update(wanted)
        _put(group, "initial_lr", rate)
        _put(group, "lr", rate * factor(scheduler.last_epoch))
    scheduler.base_lrs = [copy.copy(group["initial_lr"]) for group in optimizer.param_groups]
    scheduler._last_lr = [copy.copy(group["lr"]) for group in optimizer.param_groups]


def _settings(settings: TrainSettings) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.adam_weight_decay,
    }


def _put(group: dict[str, Any], name: str, value: float) -> None:
    """torchao keeps rates as tensors, which its compiled step reads."""
    if isinstance(group[name], torch.Tensor):
        group[name].fill_(value)
    else:
        group[name] = value
