"""What the objective asks of a student and of a teacher."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from twinflow.distributed import unwrap
from twinflow.errors import ArgumentError, require

Student = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]


_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of torch.compile and torch's activation checkpointing


def plain_name(name: str) -> str:
    """A parameter's name as it is where no submodule is compiled or wrapped: what saved states call it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def plain_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping by parameters' names, by their plain ones: earlier files have those of compiled submodules."""
    return {plain_name(name): value for name, value in tensors.items()}


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Plain name -> parameter that requires grad."""
    return {plain_name(name): p for name, p in module.named_parameters() if p.requires_grad}


def guidance_times(student: Student, t: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The times that a guidance query at (t, r = t) asks the network with; a student may say (`guidance_times`)."""
    at = getattr(unwrap(student), "guidance_times", None)
    return (t, r) if at is None else at(t, r)


def check_tensors(
    function: str, argument: str, tensors: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]
) -> None:
    """Raises ArgumentError unless saved tensors have the names and shapes of some others."""
    wanted = f"{len(tensors)} tensors ({', '.join([*tensors][:3]) or 'none'} ...)"
    difference = f"a difference in {sorted(tensors.keys() ^ saved.keys())[:3]}"
    require(tensors.keys() == saved.keys(), function, argument, wanted, difference, verb="have")
    for name, value in tensors.items():
        shape, got = tuple(value.shape), tuple(saved[name].shape)
        require(shape == got, function, name, f"of shape {shape}", got)


@torch.no_grad()
def copy_tensors(
    function: str, argument: str, tensors: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]
) -> None:
    """Copies saved tensors in place; ArgumentError, and nothing copied, where plain names or shapes differ."""
    saved = plain_names(saved)
    check_tensors(function, argument, tensors, saved)
    for name, value in tensors.items():
        value.copy_(saved[name])


class Teacher:
    """What TwinFlowLoss asks of a teacher.

    Attributes:
        cfg_by, rollout_by: who answers guidance queries and rollouts, `teacher` or `student`.
        frozen: whether guidance comes from fixed weights (data-free mode then uses docs/method.md, equation 9).
    """

    cfg_by = "teacher"
    rollout_by = "teacher"
    frozen = False

    def update(self) -> None:
        """Moves the teacher towards the student; once per optimizer step, before the step's first teacher query."""

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any, query: str) -> torch.Tensor:
        """The teacher's velocity F-(x_t, t, r | cond), without gradient.

        Args:
            x_t: (B, ...), in the latents' dtype.
            t, r: (B,) signed times.
            cond: the condition, any pytree.
            query: `cfg` or `rollout`.
        """
        raise NotImplementedError

    def check(self, student: Student) -> None:
        """Raises ValueError unless the teacher belongs to this student."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved state."""


def move_like(x: torch.Tensor, like: torch.Tensor) -> None:
    """Gives a tensor, in place, the device and dtype of another."""
    if x.device != like.device or x.dtype != like.dtype:
        x.data = x.data.to(like.device, like.dtype)


class TeacherWeights:
    """Where a teacher's own weights live; a call with them leaves the student as it is.

    Attributes:
        sources, targets: name -> trainable parameter of the student, and the tensor that stands for it.
    """

    sources: dict[str, nn.Parameter]
    targets: dict[str, torch.Tensor]

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any) -> torch.Tensor:
        """The network's velocity with these weights."""
        raise NotImplementedError

    def follow(self) -> None:
        """Moves these weights to the device and dtype that the student's have by now."""
        for name, source in self.sources.items():
            move_like(self.targets[name], source)

    def settle(self) -> None:
        """Puts shards back in place of parameters that a call without gradient has left gathered."""

    def copy_buffers(self) -> None:
        """Takes the student's buffers anew, where these weights have buffers of their own."""

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        """The buffers of their own that a state holds."""
        return {}


def check_same_student(teacher_student: Student, student: Student) -> None:
    """Raises ArgumentError where a teacher was made from another module than the student's."""
    made_from, used_with = unwrap(teacher_student), unwrap(student)
    if isinstance(made_from, nn.Module) and isinstance(used_with, nn.Module) and made_from is not used_with:
        wanted = "made from the student it is used with"
        raise ArgumentError("TwinFlowLoss", "teacher", wanted, f"a teacher of another {type(made_from).__name__}")
