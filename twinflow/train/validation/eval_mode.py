"""`eval_mode()`: a look at a student between two steps, which leaves no trace in the run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from twinflow.distributed import unwrap, without_collectives
from twinflow.interface import Student


@contextmanager
def eval_mode(student: Student, device: torch.device) -> Iterator[Student]:
    """The student to call: without gradient, dropout and collectives of DDP; every rank of FSDP2 makes the same calls.

    At the end torch's random streams and the modes of its modules are as before.

    Args:
        student: wrapped or not.
    """
    module = unwrap(student)
    training = [part for part in module.modules() if part.training] if isinstance(module, nn.Module) else []
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for part in training:
                part.training = False
            yield without_collectives(student)
        finally:
            for part in training:
                part.training = True
