"""`EMATeacher`, `StudentTeacher`, `FrozenTeacher`, and `teacher_from_options()`, which picks one."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from twinflow.distributed import unwrap, without_collectives
from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.interface import Student, Teacher, TeacherWeights, check_same_student, copy_tensors, trained_parameters
from twinflow.objective.flags import parse_flags
from twinflow.teachers.sharded_weights import local_shard
from twinflow.teachers.weights import ema_weights, frozen_weights, require_trainable
from twinflow_kernels import ema_update_

_WITHIN_A_STEP = (
    "EMATeacher: it moves again though no optimizer has stepped since it last moved. Under gradient accumulation it "
    "must move once per optimizer step: pass update_teacher=False for all micro-batches of a step but the first, and "
    "step_rows (docs/training.md). This is said once."
)


def _require_query(query: str) -> None:
    if query not in ("cfg", "rollout"):
        raise ArgumentError("velocity", "query", "cfg or rollout", repr(query))


class StudentTeacher(Teacher):
    """The student as its own teacher (EMA decay 0): no copy of the weights."""

    cfg_by = rollout_by = "student"

    def __init__(self, student: Student) -> None:
        if not callable(student):
            raise ArgumentTypeError("StudentTeacher", "student", "callable", type(student).__name__)
        self.student = student

    @torch.no_grad()
    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any, query: str) -> torch.Tensor:
        _require_query(query)
        return without_collectives(self.student)(x_t, t, r, cond)

    def check(self, student: Student) -> None:
        check_same_student(self.student, student)


class _WeightsTeacher(Teacher):
    """A teacher with weights of its own for what the student trains; frozen tensors are the student's."""

    def __init__(self, student: nn.Module, weights: TeacherWeights) -> None:
        self._student = student
        self._weights = weights
        self._trained = trained_parameters(unwrap(student))

    @property
    def module(self) -> nn.Module:
        """The teacher's network, for evaluation and export; its tensors are the teacher's own, not copies.

        Raises:
            AttributeError: the weights compute in the student's own module; call the teacher itself instead.
        """
        return self._weights.module  # type: ignore[attr-defined]

    def _follow(self) -> None:
        """Goes where the student's parameters have gone since, by `student.to(...)`."""
        self._weights.follow()

    @torch.no_grad()
    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any) -> torch.Tensor:
        """The velocity by the teacher's own weights: a student, for `sample()` and evaluation."""
        self._follow()
        return self._weights.velocity(x_t, t, r, cond)

    def check(self, student: Student) -> None:
        check_same_student(self._student, student)
        self._follow()
        module = unwrap(student)
        if not isinstance(module, nn.Module):
            return  # a plain callable around the module
        self._weights.settle()
        # The tensors themselves: one that was replaced would leave the teacher following a tensor nobody trains.
        now, before = trained_parameters(module), self._trained
        changed = sorted(n for n in now.keys() | before.keys() if now.get(n) is not before.get(n))
        if changed:
            difference = f"a difference in {', '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}"
            wanted = "those the teacher was made from"
            raise ArgumentError(type(self).__name__, "the student's trainable parameters", wanted, difference)


class EMATeacher(_WeightsTeacher):
    """An exponential moving average of the student (docs/method.md, equations 6 and 7).

    The decay warms up: d_0 = 0, d_{k+1} = d_k + (1 - d_k)(decay - d_k) / 2; update k uses d_k, so the first update
    copies the student. The average is kept in `dtype` (bf16 increments round to zero); where that differs from the
    student's dtype, the copy that computes is written in the same pass.

    A student that trains a peft adapter gets a second one on the same base: float32, as the trained one is made, and
    with the averages of what is trained beside adapters; `dtype` and `device` do not apply to it.

    Of a student under FSDP2 every rank averages its own shards, of adapters and all else that is trained: shard the
    student first, then make the teacher, and the optimizer. Every rank must make the same calls of it.

    Args:
        student: the module to follow, wrapped for DDP or compilation or not; its trainable parameters are averaged.
        decay: final decay, in (0, 1).
        adapter: name of the second adapter; None: `ema` where the student trains an adapter.
        dtype: dtype of the average; a parameter of a wider dtype keeps its own.
        device: where the average lives where it is not the computing copy itself, in pinned memory where that is the
            CPU and the student on a GPU; None: on the student's device.

    Raises:
        ValueError: decay outside (0, 1), no parameter requires grad, or an adapter name that is taken or has no use.
        TypeError: student is not an nn.Module, or has a trainable parameter that is not floating.
    """

    def __init__(
        self,
        student: nn.Module,
        decay: float,
        *,
        adapter: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
            raise ArgumentError("EMATeacher", "decay", "in (0, 1)", repr(decay))
        if decay in (0, 1):
            instead = "StudentTeacher (the student teaches itself)" if decay == 0 else "FrozenTeacher (fixed weights)"
            raise ArgumentError("EMATeacher", "decay", "in (0, 1)", decay, hint=f"use {instead}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ArgumentTypeError("EMATeacher", "dtype", "a floating dtype", repr(dtype))
        require_trainable("EMATeacher", student)
        for name, parameter in unwrap(student).named_parameters():
            if parameter.requires_grad and not parameter.is_floating_point():
                raise ArgumentTypeError("EMATeacher", f"parameter {name}", "floating", parameter.dtype)
        weights, self.adapter = ema_weights(student, adapter)
        super().__init__(student, weights)
        self.decay = float(decay)
        self.current_decay = 0.0
        self.updates = 0
        self._shadow = {
            name: target.detach() if self.adapter else _shadow_of(target, dtype, device)
            for name, target in self._weights.targets.items()
        }
        targets = self._weights.targets
        self._placed = device is not None  # a separate average stays where it was asked to live
        self._shared = {name for name, shadow in self._shadow.items() if _address(shadow) == _address(targets[name])}
        self._said = False
        self._versions: dict[str, int] | None = None  # of the student's parameters at the last update

    def _follow(self) -> None:
        super()._follow()
        for name, shadow in self._shadow.items():
            target = self._weights.targets[name]
            if name not in self._shared:
                if not self._placed and shadow.device != target.device:
                    self._shadow[name] = shadow.to(target.device)
            elif _address(target) != _address(shadow):
                if target.dtype == shadow.dtype:
                    self._shadow[name] = target.detach()
                else:  # the average keeps its dtype beside a copy in the student's new one
                    self._shared.discard(name)
                    self._shadow[name] = shadow.to(target.device)

    def _say_where_it_moves_within_a_step(self) -> None:
        """Warns once where gradients have added up since the last update and no optimizer has stepped."""
        versions = {name: parameter._version for name, parameter in self._trained.items()}
        graded = any(parameter.grad is not None for parameter in self._trained.values())
        if graded and versions == self._versions and not self._said:
            self._said = True
            warnings.warn(_WITHIN_A_STEP, stacklevel=6)
        self._versions = versions

    @torch.no_grad()
    def update(self) -> None:
        self._follow()
        self._say_where_it_moves_within_a_step()
        targets, sources, copies = [], [], []
        for name, average in self._shadow.items():
            source, compute = (local_shard(x[name].detach()) for x in (self._weights.sources, self._weights.targets))
            shadow = local_shard(average)
            separate = compute.data_ptr() != shadow.data_ptr()
            targets.append(_flat(shadow, shadow))
            sources.append(_flat(source.to(shadow.device), shadow))
            copies.append(_flat(compute, shadow) if separate and compute.device == shadow.device else None)
        ema_update_(targets, sources, self.current_decay, copies if any(c is not None for c in copies) else None)
        for name, shadow in self._shadow.items():
            if self._weights.targets[name].device != shadow.device:
                self._weights.targets[name].copy_(shadow)
        self._weights.copy_buffers()
        self.current_decay += (1 - self.current_decay) * (self.decay - self.current_decay) / 2
        self.updates += 1

    @torch.no_grad()
    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any, query: str) -> torch.Tensor:
        _require_query(query)
        return self._weights.velocity(x_t, t, r, cond)

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
        copy_tensors(type(self).__name__, "the state", self._shadow, state["shadow"])
        for name, value in self._shadow.items():
            self._weights.targets[name].copy_(value)
        self.decay, self.current_decay, self.updates = decay, current_decay, updates


class FrozenTeacher(_WeightsTeacher):
    """The student's weights as they are now, fixed (EMA decay 1): guidance comes from them, rollouts from the student.

    Of a student that trains a peft adapter it is the base without that adapter, with the conditioning as it is now.

    Args:
        student: the module to copy, wrapped for DDP or compilation or not.
    """

    rollout_by = "student"
    frozen = True

    def __init__(self, student: nn.Module) -> None:
        require_trainable("FrozenTeacher", student)
        super().__init__(student, frozen_weights(student))

    @torch.no_grad()
    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any, query: str) -> torch.Tensor:
        _require_query(query)
        if query == "rollout":
            return without_collectives(self._student)(x_t, t, r, cond)
        return self._weights.velocity(x_t, t, r, cond)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": {name: value.detach().clone() for name, value in self._fixed().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        copy_tensors(type(self).__name__, "the state", self._fixed(), state["weights"])

    def _fixed(self) -> dict[str, torch.Tensor]:
        """The tensors of its own: copied parameters, and saved buffers, which an EMA takes from the student anew."""
        return {**self._weights.targets, **self._weights.saved_buffers()}


def _address(x: torch.Tensor) -> int:
    return local_shard(x).data_ptr()


def _shadow_of(target: torch.Tensor, dtype: torch.dtype, device: torch.device | str | None) -> torch.Tensor:
    """The tensor that holds an average: the target itself, or a copy in another dtype or on another device."""
    if torch.promote_types(target.dtype, dtype) == target.dtype and dtype == torch.float32:
        dtype = target.dtype
    place = target.device if device is None else torch.device(device)
    if hasattr(target, "to_local"):
        if place.type != target.device.type:
            wanted = "None where the student is sharded, as an average lies beside its parameter's shards"
            raise ArgumentError("EMATeacher", "device", wanted, device)
        place = target.device
    if dtype == target.dtype and place == target.device:
        return target.detach()
    shadow = target.detach().to(device=place, dtype=dtype, copy=True)
    return shadow.pin_memory() if place.type == "cpu" and target.device.type == "cuda" else shadow


def _flat(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The elements in the memory order of `like`, so that dense layouts such as channels_last need no copy."""
    if like.is_contiguous():
        return x
    if x.stride() != like.stride():
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((x.numel(),), (1,))


def teacher_from_options(
    student: Student,
    options: Mapping[str, Any],
    *,
    use_ema: bool,
    decay: float = 0.99,
    device: torch.device | str | None = None,
) -> Teacher:
    """Picks the teacher: an EMA of the student where one is kept, else the student where the options permit that.

    Without an EMA the student teaches itself only if `twinflow_require_ema` is off or `twinflow_allow_no_ema_teacher`
    is on; so it does with an EMA that cannot be kept, of a student that is no module.

    Args:
        student: the student, wrapped for DDP or compilation or not.
        options: what `TwinFlowConfig.from_flags` leaves, or the `twinflow_*` and `diff2flow_*` options themselves.
        use_ema: whether the training keeps an EMA.
        decay: the EMA's final decay, in (0, 1).
        device: where the average lives; see `EMATeacher`.

    Raises:
        TypeError: use_ema is not a bool.
        ValueError: an EMA is required but not kept, or the student has nothing to average.
    """
    if not isinstance(use_ema, bool):
        raise ArgumentTypeError("teacher_from_options", "use_ema", "True or False", repr(use_ema))
    _, options = parse_flags(options)
    may_teach_itself = options["twinflow_allow_no_ema_teacher"] or not options["twinflow_require_ema"]
    module = unwrap(student)
    if use_ema and isinstance(module, nn.Module):
        if not trained_parameters(module):
            raise ValueError("EMA teacher unavailable because no trainable component was found.")
        return EMATeacher(student, decay, device=device)  # type: ignore[arg-type]  # what wraps a module is one
    if may_teach_itself:
        return StudentTeacher(student)
    if use_ema:
        raise ValueError("EMA teacher weights are required but unavailable; enable use_ema or allow fallback.")
    raise ValueError(
        "TwinFlow requires an EMA teacher; enable use_ema or set twinflow_allow_no_ema_teacher to fall back to student "
        "weights explicitly."
    )
