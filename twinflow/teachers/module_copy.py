"""`ModuleCopy`: a teacher's weights as a copy of the student's trainable tensors, in a module of their own."""

import copy
from typing import Any

import torch
from torch import nn

from twinflow.distributed import unwrap
from twinflow.interface import Student, trained_parameters


class ModuleCopy:
    """A copy of the student that shares its frozen tensors.

    Args:
        student: the module, wrapped for DDP or compilation or not.

    Attributes:
        sources, targets: name -> trainable parameter of the student, and the copy of it.
        module: the network that computes with the copies.
    """

    def __init__(self, student: nn.Module) -> None:
        self._student = student
        original = unwrap(student)
        assert isinstance(original, nn.Module)
        self.sources = trained_parameters(original)
        frozen = {id(p): p for p in original.parameters() if not p.requires_grad}
        self.module: nn.Module = copy.deepcopy(original, memo=frozen)
        for parameter in self.module.parameters():
            if id(parameter) not in frozen:
                parameter.requires_grad_(False)
        copied = dict(self.module.named_parameters())
        self.targets: dict[str, torch.Tensor] = {n: copied[n] for n in self.sources}
        compiled = getattr(student, "_orig_mod", None) is not None
        self._call: Student = torch.compile(self.module) if compiled else self.module

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any) -> torch.Tensor:
        """The copy's velocity, with dropout active where it is in the student."""
        original = unwrap(self._student)
        if self.module.training != original.training:
            self.module.train(original.training)
        return self._call(x_t, t, r, cond)

    def settle(self) -> None:
        """Nothing to do: no parameter is gathered."""

    def copy_buffers(self) -> None:
        """Takes the student's buffers anew."""
        copies = list(self.module.named_buffers())
        originals = dict(unwrap(self._student).named_buffers()) if copies else {}
        for name, buffer in copies:
            buffer.copy_(originals[name])

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        """The copy's buffers that a state holds."""
        saved = self.module.state_dict(keep_vars=True)
        return {name: b for name, b in self.module.named_buffers() if name in saved}
