"""`observed()`: a look at a student between two steps, which leaves no trace in the run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from twinflow.interface import Student, unwrap, without_collectives


@contextmanager
def observed(student: Student, device: torch.device) -> Iterator[Student]:
    """The student to call: without gradient, dropout and collectives of DDP; every rank of FSDP2 makes the same calls.

    At the end torch's random streams, the modes of its modules and the sharding of its parameters are as before.

    Args:
        student: wrapped or not.
        device: where it computes.
    """
    module = unwrap(student)
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    training = [part for part in parts if part.training]
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for part in training:
                part.training = False
            yield without_collectives(student)
        finally:
            for part in training:
                part.training = True
            for part in parts:
                if isinstance(part, FSDPModule):
                    part.reshard()  # the outermost one keeps what a call gathers until backward
