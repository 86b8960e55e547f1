"""`ShardedWeights`: a teacher's weights beside a student that FSDP2 has sharded, each rank with its shards of them.

FSDP gathers what the student's own shards hold when a call comes to them, and neither a copy of a sharded module nor a
parameter that is added to one is gathered. So the teacher's shards change places with the student's, in place, for as
long as a call runs. Nothing more is gathered or kept than for a call of the student.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from twinflow.distributed import unwrap
from twinflow.errors import ArgumentError
from twinflow.interface import Student, TeacherWeights, trained_parameters

_EXCHANGE_BYTES = 1 << 26  # shards that are copied aside at a time


def is_sharded(student: Student) -> bool:
    """Whether FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded a student."""
    module = unwrap(student)
    if not isinstance(module, nn.Module) or not distributed.is_available() or not distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in module.modules())


def local_shard(x: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a sharded tensor, in its memory; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x  # DTensor is not imported where it is not in use


class ShardedWeights(TeacherWeights):
    """Copies of a sharded student's trainable parameters, sharded as they are.

    Args:
        student: the module, compiled or not.
        without: ids of parameters that are not the teacher's.

    Raises:
        ValueError: a trainable parameter's shards are offloaded to the host.
    """

    def __init__(self, student: nn.Module, without: Iterable[int] = ()) -> None:
        from torch.distributed.fsdp import FSDPModule

        self._student = student
        original = unwrap(student)
        assert isinstance(original, nn.Module)
        self._gathered: list[Any] = [m for m in original.modules() if isinstance(m, FSDPModule)]
        self.settle()
        left_out = set(without)
        self.sources = {n: p for n, p in trained_parameters(original).items() if id(p) not in left_out}
        for name, parameter in self.sources.items():
            # Their copies to the device run behind the host, which would change them under way.
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is not None and mesh.device_type != parameter.device.type:
                wanted = f"sharded on its {mesh.device_type} device"
                raise ArgumentError("EMATeacher", "student", wanted, f"{name} offloaded to {parameter.device}")
        self.targets: dict[str, torch.Tensor] = {n: p.detach().clone() for n, p in self.sources.items()}

    def follow(self) -> None:
        """Nothing to do: shards stay on the device of their mesh."""

    def settle(self) -> None:
        for module in self._gathered:
            module.reshard()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes the student's module compute with these weights; the student's are back afterwards."""
        self.settle()
        self._exchange()
        try:
            yield
        finally:
            self.settle()
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for teachers, students in self._shards():
            aside = [x.clone() for x in teachers]
            torch._foreach_copy_(teachers, students)
            torch._foreach_copy_(students, aside)

    def _shards(self) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """The teacher's shards and the student's, a few at a time; FSDP may move them, so they are looked up anew."""
        teachers: list[torch.Tensor] = []
        students: list[torch.Tensor] = []
        size = 0
        for name, parameter in self.sources.items():
            teachers.append(local_shard(self.targets[name]))
            students.append(local_shard(parameter))
            size += teachers[-1].nbytes
            if size >= _EXCHANGE_BYTES:
                yield teachers, students
                teachers, students, size = [], [], 0
        if teachers:
            yield teachers, students

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any) -> torch.Tensor:
        network: Student = self._student
        with self.active():
            return network(x_t, t, r, cond)
