"""The three teachers, one interface: `EMATeacher`, `StudentTeacher`, `FrozenTeacher`."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twinflow.interface import Student, Teacher, check_same_student, unwrap, without_collectives
from twinflow_kernels import ema_update_


def _require_query(query: str) -> None:
    if query not in ("cfg", "rollout"):
        raise ValueError(f"velocity: query must be cfg or rollout, got {query!r}")


class StudentTeacher(Teacher):
    """The student as its own teacher (EMA decay 0): no copy of the weights."""

    cfg_by = rollout_by = "student"

    def __init__(self, student: Student) -> None:
        if not callable(student):
            raise TypeError(f"StudentTeacher: student must be callable, got {type(student).__name__}")
        self.student = student

    @torch.no_grad()
    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any, query: str) -> torch.Tensor:
        _require_query(query)
        return without_collectives(self.student)(x_t, t, r, cond)

    def check(self, student: Student) -> None:
        check_same_student(self.student, student)


class _CopyTeacher(Teacher):
    """A teacher that holds a copy of the student's trainable tensors; frozen tensors are the student's own."""

    def __init__(self, student: nn.Module) -> None:
        name = type(self).__name__
        module = unwrap(student)
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: student must be an nn.Module, got {type(student).__name__}")
        self._sources = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self._sources:
            raise ValueError(f"{name}: student must have a parameter that requires grad, got none")
        self._student = student
        frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
        self._module = copy.deepcopy(module, memo=frozen)
        for parameter in self._module.parameters():
            if id(parameter) not in frozen:
                parameter.requires_grad_(False)
        copied = dict(self._module.named_parameters())
        self._targets = {n: copied[n] for n in self._sources}
        compiled = getattr(student, "_orig_mod", None) is not None
        self._call: Student = torch.compile(self._module) if compiled else self._module

    @property
    def module(self) -> nn.Module:
        """The teacher's network, for evaluation and export; its tensors are the teacher's own, not copies."""
        return self._module

    def check(self, student: Student) -> None:
        check_same_student(self._student, student)
        module = unwrap(student)
        if not isinstance(module, nn.Module):
            return  # a plain callable around the module
        # The tensors themselves: one that was replaced would leave the teacher following a tensor nobody trains.
        now = {n: p for n, p in module.named_parameters() if p.requires_grad}
        mine = self._sources
        changed = sorted(n for n in now.keys() | mine.keys() if now.get(n) is not mine.get(n))
        if changed:
            raise ValueError(
                f"{type(self).__name__}: the student's trainable parameters must be those the teacher was made from, "
                f"got a difference in {', '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}"
            )

    @torch.no_grad()
    def _velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any) -> torch.Tensor:
        module = unwrap(self._student)
        if self._module.training != module.training:  # type: ignore[attr-defined]
            self._module.train(module.training)  # type: ignore[attr-defined]
        return self._call(x_t, t, r, cond)

    def _copy_buffers(self) -> None:
        theirs = dict(unwrap(self._student).named_buffers())  # type: ignore[attr-defined]
        for name, mine in self._module.named_buffers():
            mine.copy_(theirs[name])


class EMATeacher(_CopyTeacher):
    """An exponential moving average of the student (docs/method.md, equations 6 and 7).

    The decay warms up: d_0 = 0, d_{k+1} = d_k + (1 - d_k)(decay - d_k) / 2; update k uses d_k, so the first update
    copies the student. The average is kept in `dtype` (bf16 increments round to zero); where that differs from the
    student's dtype, the copy that computes is written in the same pass.

    Args:
        student: the module to follow, wrapped for DDP or compilation or not; its trainable parameters are averaged.
        decay: final decay, in (0, 1).
        dtype: dtype of the average; a parameter of a wider dtype keeps its own.
        device: where the average lives where it is not the computing copy itself; None: on the student's device.

    Raises:
        ValueError: decay outside (0, 1), or no parameter requires grad.
        TypeError: student is not an nn.Module, or has a trainable parameter that is not floating.
    """

    def __init__(
        self,
        student: nn.Module,
        decay: float,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
            raise ValueError(f"EMATeacher: decay must be in (0, 1), got {decay!r}")
        if decay in (0, 1):
            instead = "StudentTeacher (the student teaches itself)" if decay == 0 else "FrozenTeacher (fixed weights)"
            raise ValueError(f"EMATeacher: decay must be in (0, 1), got {decay}; use {instead}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"EMATeacher: dtype must be a floating dtype, got {dtype!r}")
        super().__init__(student)
        for name, target in self._targets.items():
            if not target.is_floating_point():
                raise TypeError(f"EMATeacher: parameter {name} must be floating, got {target.dtype}")
        self.decay = float(decay)
        self.current_decay = 0.0
        self.updates = 0
        self._shadow = {name: self._shadow_of(target, dtype, device) for name, target in self._targets.items()}

    @staticmethod
    def _shadow_of(target: torch.Tensor, dtype: torch.dtype, device: torch.device | str | None) -> torch.Tensor:
        wanted = dtype
        if torch.promote_types(target.dtype, dtype) == target.dtype and dtype == torch.float32:
            wanted = target.dtype
        if wanted == target.dtype and (device is None or torch.device(device) == target.device):
            return target.detach()
        return target.detach().to(device=device or target.device, dtype=wanted, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        targets, sources, copies = [], [], []
        for name, shadow in self._shadow.items():
            source, compute = self._sources[name].detach(), self._targets[name].detach()
            separate = compute.data_ptr() != shadow.data_ptr()
            targets.append(_flat(shadow, shadow))
            sources.append(_flat(source.to(shadow.device), shadow))
            copies.append(_flat(compute, shadow) if separate and compute.device == shadow.device else None)
        ema_update_(targets, sources, self.current_decay, copies if any(c is not None for c in copies) else None)
        for name, shadow in self._shadow.items():
            if self._targets[name].device != shadow.device:
                self._targets[name].copy_(shadow)
        self._copy_buffers()
        self.current_decay += (1 - self.current_decay) * (self.decay - self.current_decay) / 2
        self.updates += 1

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any, query: str) -> torch.Tensor:
        _require_query(query)
        return self._velocity(x_t, t, r, cond)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Name -> average, for export and evaluation; the teacher's own tensors, not copies."""
        return dict(self._shadow)

    def state_dict(self) -> dict[str, Any]:
        return {
            "decay": self.decay,
            "current_decay": self.current_decay,
            "updates": self.updates,
            "shadow": {name: value.clone() for name, value in self._shadow.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        decay, current_decay, updates = float(state["decay"]), float(state["current_decay"]), int(state["updates"])
        _load(type(self).__name__, self._shadow, state["shadow"])
        for name, value in self._shadow.items():
            self._targets[name].copy_(value)
        self.decay, self.current_decay, self.updates = decay, current_decay, updates


class FrozenTeacher(_CopyTeacher):
    """The student's weights as they are now, fixed (EMA decay 1): guidance comes from them, rollouts from the student.

    Args:
        student: the module to copy, wrapped for DDP or compilation or not.
    """

    rollout_by = "student"
    frozen = True

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)

    @torch.no_grad()
    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any, query: str) -> torch.Tensor:
        _require_query(query)
        if query == "rollout":
            return without_collectives(self._student)(x_t, t, r, cond)
        return self._velocity(x_t, t, r, cond)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": {name: value.detach().clone() for name, value in self._fixed().items()}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _load(type(self).__name__, self._fixed(), state["weights"])

    def _fixed(self) -> dict[str, torch.Tensor]:
        """The tensors of its own: copied parameters, and saved buffers, which an EMA takes from the student anew."""
        saved = self._module.state_dict(keep_vars=True)
        return {**self._targets, **{name: b for name, b in self._module.named_buffers() if name in saved}}


def _flat(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The elements in the memory order of `like`, so that dense layouts such as channels_last need no copy."""
    if like.is_contiguous():
        return x
    if x.stride() != like.stride():
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((x.numel(),), (1,))


def _load(where: str, mine: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    if set(mine) != set(saved):
        changed = sorted(set(mine) ^ set(saved))
        raise ValueError(f"{where}: the state's parameters must be the teacher's, got a difference in {changed[:3]}")
    for name, value in mine.items():
        if value.shape != saved[name].shape:
            raise ValueError(
                f"{where}: {name} must be of shape {tuple(value.shape)}, got {tuple(saved[name].shape)} in the state"
            )
    for name, value in mine.items():
        value.copy_(saved[name])
