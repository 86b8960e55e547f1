"""`offload_activations`: what autograd saves for backward waits in host memory, not on the device.

A storage that saved tensors share is copied once, on a stream of its own. It stays on the device as well until the
window of `in_flight_bytes` is full: then the stream it was allocated on waits for the copy, and the memory is free. In
backward the same window holds what comes back early, in the reverse order of saving. So at most the window is on the
device beside what the running node uses, and the host waits for nothing.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from twinflow.errors import ArgumentError, require, require_type
from twinflow.memory.blocks import Attached, replace_forward
from twinflow.memory.offload.hooks import DEVICES, OffloadHooks, OffloadStats
from twinflow.memory.offload.host_pool import HostPool, available_host_bytes

__all__ = ["AttachedOffload", "OffloadStats", "offload_activations"]

_NAME = "offload_activations"


class offload_activations:
    """Keeps tensors saved for backward in a pool of host memory; gradients stay the same bits.

    Around a forward (`with offload: loss = model(x)`), or around every differentiated call of a module (`attach`). The
    pool is taken once, here. Parameters, other leaves that require
    grad, views of them, and tensor subclasses stay where they are. A forward runs on one stream.

    Args:
        budget_gb: size of the pool, GB; what does not fit stays on the device.
        min_bytes: storages smaller than this stay on the device.
        pin_memory: whether the pool of a CUDA device is pinned; pageable memory makes copies synchronous.
        in_flight_bytes: device memory for tensors on their way, both ways together; None: 512 MiB, or a quarter of the
            budget if that is less.
        device: whose tensors to offload, others stay; None: that of the first, and another device is an error.

    Raises:
        TypeError, ValueError: an argument of another kind, or more than the host's available memory.
        RuntimeError: the system refuses to pin so much.
    """

    def __init__(
        self,
        budget_gb: float,
        *,
        min_bytes: int = 1 << 20,
        pin_memory: bool = True,
        in_flight_bytes: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        number = isinstance(budget_gb, (int, float)) and not isinstance(budget_gb, bool)
        require_type(number, _NAME, "budget_gb", "a number", type(budget_gb).__name__)
        require(math.isfinite(budget_gb) and budget_gb > 0, _NAME, "budget_gb", "> 0", budget_gb)
        budget = round(budget_gb * 1e9)
        window = window_bytes(budget) if in_flight_bytes is None else in_flight_bytes
        for name, value in (("min_bytes", min_bytes), ("in_flight_bytes", window)):
            require(type(value) is int and value >= 0, _NAME, name, "an integer >= 0", repr(value))
        where, available = _checked_device(device), available_host_bytes()
        on_meta = where is not None and where.type == "meta"
        if not on_meta and available is not None and budget > available:
            wanted = f"at most the host memory available, {available / 1e9:.1f} GB"
            raise ArgumentError(_NAME, "budget_gb", wanted, f"{budget_gb:g}")
        pinned = pin_memory and torch.cuda.is_available() and (where is None or where.type == "cuda")
        self._hooks = hooks = OffloadHooks(HostPool(budget, None if on_meta else pinned), where, min_bytes, window)
        # A compiler must not trace what runs beside its graphs.
        pack, unpack, self._admit = (torch.compiler.disable(f) for f in (hooks.pack, hooks.unpack, hooks.admit))
        self._context = saved_tensors_hooks(pack, unpack)

    @property
    def stats(self) -> OffloadStats:
        """Counts of tensors and bytes so far."""
        return self._hooks.stats()

    def __enter__(self) -> "offload_activations":
        self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)

    def attach(self, module: nn.Module) -> "AttachedOffload":
        """Offloads what every differentiated call of a module saves; calls under no_grad are left alone.

        Args:
            module: its own parameters and buffers stay on the device; copies made of it later offload too.

        Returns:
            What ends it: `remove()`.

        Raises:
            TypeError: not a module.
        """
        require_type(isinstance(module, nn.Module), _NAME, "module", "an nn.Module", type(module).__name__)
        return AttachedOffload(self, module)


class AttachedOffload(Attached):
    """An offload around the calls of a module and its copies; what is in the pool stays until its graph is gone."""

    def __init__(self, offload: offload_activations, module: nn.Module) -> None:
        offloads = [offload]
        super().__init__([replace_forward(module, _offloaded(module, offloads)), offloads.clear])


def _offloaded(module: nn.Module, offloads: list[offload_activations]) -> Callable[..., Any]:
    """A module's forward, or what others put in its place, inside the offload while there is one."""
    others = vars(module).get("forward")

    @functools.wraps(type(module).forward)
    def forward(called: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(type(called).forward, called) if others is None else others
        if not (offloads and torch.is_grad_enabled()):
            return call(*args, **kwargs)
        offloads[0]._admit(called)
        with offloads[0]:
            return call(*args, **kwargs)

    return forward


def window_bytes(budget: int) -> int:
    """Device memory for tensors on their way where nothing else is asked for, bytes, for a budget of bytes."""
    return min(1 << 29, budget // 4)


def _checked_device(device: torch.device | str | None) -> torch.device | None:
    """The device with its index; None as it is."""
    if device is None:
        return None
    found = torch.device(device)
    require(found.type in DEVICES, _NAME, "device", f"{', '.join(DEVICES)} or None", found)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found
