"""`build_optimizer()`, `warm_up()`: what moves the weights, and how fast."""

from collections.abc import Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from twinflow.memory import AppliedMemory, adamw_8bit
from twinflow.train.settings import TrainSettings


def build_optimizer(
    settings: TrainSettings, parameters: Iterable[torch.nn.Parameter], memory: AppliedMemory
) -> torch.optim.Optimizer:
    """The optimizer of a run; where the memory preset counts on 8-bit AdamW, that in plain AdamW's place.

    Args:
        settings: of the run.
        parameters: what is trained, on its device.
        memory: what was applied.

    Raises:
        ImportError: the library of an 8-bit optimizer is missing.
    """
    trained: Sequence[torch.nn.Parameter] = list(parameters)
    how = dict(
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.adam_weight_decay,
    )
    if settings.optimizer == "radam":
        return torch.optim.RAdam(trained, decoupled_weight_decay=True, **how)  # type: ignore[arg-type]
    if settings.optimizer == "adamw8bit":
        library = "torchao" if any(isinstance(p, DTensor) for p in trained) else "bitsandbytes"
        return adamw_8bit(trained, library=library, **how)  # type: ignore[arg-type]
    return memory.adamw(trained, **how)


def warm_up(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """A schedule that reaches the learning rate after some steps, in equal parts, and stays there."""
    return LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / max(steps, 1)))
