"""`TimeConditioning`: tells an unmodified transformer both signed times (docs/method.md, equations 29 to 31).

A transformer embeds one time: sinusoidal features go into a small MLP, the embedder. Two hooks on the embedder replace
the features by those of float32 times and add what belongs to r and to the sign. New parameters are submodules of the
transformer under the names found in published checkpoints; nothing of it is replaced or subclassed.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import nn

import twinflow_kernels  # noqa: F401 - its operations
from twinflow.errors import ArgumentError, require

Owner = TypeVar("Owner")

MODES = ("dual", "midpoint", "sign", "dual+sign", "midpoint+sign")
LORA_MODE = "dual"  # the best of benchmarks/conditioning.py
SIGN_TABLE = "time_sign_embed"  # submodule of the `sign` modes


@dataclass(frozen=True)
class TimeEmbedder:
    """Where and how a transformer embeds its time.

    Args:
        path: the submodule whose first input are the sinusoidal features, (B, num_channels), and whose output is the
            embedding, (B, D).
        second: path of the second embedder of the `dual` modes.
        scale: factor from our time to the angle of the first frequency, radians.
        num_channels, flip_sin_to_cos, downscale_freq_shift: of the features, as in diffusers' `Timesteps`.
        reversed: the transformer's time runs from 0 at noise to 1 at data.
        difference: the second embedder is asked for t - r instead of r.
    """

    path: str
    second: str
    scale: float = 1000.0
    num_channels: int = 256
    flip_sin_to_cos: bool = True
    downscale_freq_shift: float = 0.0
    reversed: bool = False
    difference: bool = False


class SignTable(nn.Module):
    """A trainable row for negative times; the row of positive times is zero and stays so (equation 30)."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, width, device=device, dtype=dtype))

    def forward(self) -> torch.Tensor:
        """The table, (2, D); no gradient reaches row 0."""
        return torch.cat([torch.zeros_like(self.weight[:1]), self.weight[1:]])


@dataclass
class BoundCall:
    """What is known of a call that runs: its times, or the timestep that they are found by when they are needed."""

    times: tuple[torch.Tensor, torch.Tensor] | None = None
    timestep: torch.Tensor | None = None
    second_features: torch.Tensor | None = None


class TimeConditioning:
    """Conditions a transformer on (t, r) through hooks on its time embedder.

    At initialisation, and at r = t in the `dual` modes, the transformer computes what it computed before; in the
    `midpoint` modes that holds at r = 0. Parameters are made in float32 on the embedder's device.

    Args:
        transformer: the module that gets the new submodules; any inner wrapper is the caller's.
        embedder: where its time goes in.
        mode: `dual`: emb(t) + emb2(r) (t - r); `midpoint`: emb(t - r/2); `sign`: emb(|t|) + a row for t < 0, blind to
            r; `dual+sign`, `midpoint+sign`: both.

    Raises:
        ValueError: an unknown mode, a transformer without that embedder, or one that is conditioned already.

    Source: TwinFlow (arXiv 2512.05150).
    """

    def __init__(self, transformer: nn.Module, embedder: TimeEmbedder, mode: str) -> None:
        require(mode in MODES, "TimeConditioning", "mode", f"one of {', '.join(MODES)}", repr(mode))
        self.mode, self.embedder = mode, embedder
        self.names: tuple[str, ...] = ()
        self._calls: dict[int, BoundCall] = {}  # thread -> its call
        self._shared: BoundCall | None = None  # the latest call: what compiled code, which asks for no thread, reads
        self._strength: Callable[[], float] | None = None
        self._find_times: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
        first = _submodule(transformer, embedder.path)
        taken = [n for n in (embedder.second.partition(".")[0], SIGN_TABLE) if hasattr(transformer, n)]
        before = hook_owner(first, TimeConditioning)
        taken += [] if before is None else [before.mode]
        got = f"one with {', '.join(taken)}"
        require(not taken, "TimeConditioning", "transformer", "without conditioning", got)
        self.second = self._add_second(transformer, first) if "dual" in mode else None
        self.table = self._add_table(transformer, first) if "sign" in mode else None
        transformer._conditioning_names = self.names  # type: ignore[assignment]
        first.register_forward_pre_hook(self._features)
        first.register_forward_hook(self._combine)

    def _add_second(self, transformer: nn.Module, first: nn.Module) -> nn.Module:
        """A copy of the embedder whose last layer is zero: no effect at initialisation."""
        second = plain_copy(first).float().requires_grad_(True)
        last = [layer for layer in second.modules() if isinstance(layer, nn.Linear)][-1]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        root, *inner = self.embedder.second.split(".")
        for name in reversed(inner):
            holder = nn.Module()
            holder.add_module(name, second)
            second = holder
        transformer.add_module(root, second)
        self.names += (root,)
        return _submodule(transformer, self.embedder.second)

    def _add_table(self, transformer: nn.Module, first: nn.Module) -> SignTable:
        last = [layer for layer in plain_copy(first).modules() if isinstance(layer, nn.Linear)][-1]
        table = SignTable(last.out_features, last.weight.device, torch.float32)
        transformer.add_module(SIGN_TABLE, table)
        self.names += (SIGN_TABLE,)
        return table

    def parameters(self) -> Iterator[nn.Parameter]:
        """The new parameters."""
        for module in (self.second, self.table):
            if module is not None:
                yield from module.parameters()

    def requires_grad_(self, requires_grad: bool = True) -> None:
        """Makes the new parameters trainable, or not: peft freezes them when it adds an adapter."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)

    @contextmanager
    def times(self, t: torch.Tensor, r: torch.Tensor) -> Iterator[None]:
        """Binds the signed times (B,) of the calls inside.

        Args:
            t, r: float32 or float64, in [-1, 1].
        """
        with self._bound(BoundCall((t, r))):
            yield

    @contextmanager
    def _bound(self, call: BoundCall) -> Iterator[None]:
        before = self.begin(call)
        try:
            yield
        finally:
            self.end(before)

    def begin(self, call: BoundCall) -> tuple[BoundCall | None, BoundCall | None]:
        """Binds a call; returns what `end` puts back."""
        shared, self._shared = self._shared, call
        if torch.compiler.is_compiling():
            return None, shared
        mine = self._calls.get(get_ident())
        self._calls[get_ident()] = call
        return mine, shared

    def end(self, before: tuple[BoundCall | None, BoundCall | None]) -> None:
        """Unbinds the call of this thread."""
        mine, self._shared = before
        if torch.compiler.is_compiling():
            return
        if mine is None:
            self._calls.pop(get_ident(), None)
        else:
            self._calls[get_ident()] = mine

    def _current(self) -> BoundCall | None:
        return self._shared if torch.compiler.is_compiling() else self._calls.get(get_ident(), self._shared)

    def serve(
        self,
        find_times: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        strength: Callable[[], float] | None,
    ) -> None:
        """Works for a pipeline.

        Args:
            find_times: a call's own timestep -> its signed times (B,), asked where they are needed.
            strength: how strong the adapter that was trained with the conditioning is now, and so the second embedding
                and the sign's row; at 0 the transformer computes what it computes without conditioning. None: always 1.
        """
        self._find_times, self._strength = find_times, strength

    def remove(self, transformer: nn.Module) -> None:
        """Takes hooks and submodules off again."""
        remove_hooks(_submodule(transformer, self.embedder.path), self)
        for name in self.names:
            delattr(transformer, name)
        transformer._conditioning_names = ()  # type: ignore[assignment]

    def _asked(self, t: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the embedders are asked: the transformer's own time, and that of the second embedder."""
        if "midpoint" in self.mode:
            t = t - r / 2
        if self.table is not None:
            t, r = t.abs(), r.abs()
        if self.second is None:
            return (1 - t if self.embedder.reversed else t), None
        second = t - r if self.embedder.difference else (1 - r if self.embedder.reversed else r)
        return (1 - t if self.embedder.reversed else t), second

    def _features(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pre-hook: the features of the bound times, in the dtype the embedder was given."""
        call = self._current()
        if self._strength is not None and self._strength() == 0:
            return None
        if call is not None and call.times is None and call.timestep is not None and self._find_times is not None:
            call.times = self._find_times(call.timestep)
        if call is None or call.times is None:
            if self.second is None:
                return None  # positive times, asked for r = 0: what the stock transformer computes is right
            which = f"a transformer conditioned by {self.mode}"
            hint = "call it through the student, or twinflow.attach(pipe, ...) in a pipeline"
            raise ArgumentError("TimeConditioning", which, "told both times", "only its own", hint)
        given, *rest = args
        e = self.embedder
        t, r = self._asked(*call.times)
        features = torch.ops.twinflow.time_features(
            t, r, False, e.num_channels, e.flip_sin_to_cos, e.downscale_freq_shift, e.scale
        )
        call.second_features = None if r is None else features[1]
        return (features[0].to(given.dtype), *rest)

    def _combine(self, module: nn.Module, args: tuple[Any, ...], embedding: torch.Tensor) -> torch.Tensor:
        """Hook: adds the second embedding and the sign's row."""
        call = self._current()
        strength = 1.0 if self._strength is None else self._strength()
        if call is None or call.times is None or strength == 0 or (self.second is None and self.table is None):
            return embedding
        t, r = call.times
        second = None
        if self.second is not None:
            assert call.second_features is not None
            dtype = next(self.second.parameters()).dtype
            computes = embedding.dtype if dtype.itemsize == 1 else dtype  # stored in 8 bits by layerwise casting
            second = self.second(call.second_features.to(computes))
            second = second if strength == 1 else second * strength
        table = None if self.table is None else self.table() * strength if strength != 1 else self.table()
        return torch.ops.twinflow.combine_time_embeddings(embedding, second, t, None if second is None else r, table)


def hook_owner(module: nn.Module, kind: type[Owner]) -> Owner | None:
    """The object of a class whose method is a forward pre-hook of a module; None: there is none."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, kind)), None)


def remove_hooks(module: nn.Module, owner: object) -> None:
    """Takes off the hooks that are an object's methods."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__self__", None) is owner:
                del hooks[key]
                for options in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                    options.pop(key, None)


def conditioning_names(transformer: nn.Module) -> tuple[str, ...]:
    """The submodules that conditioning added to a transformer, or to one that it is a copy of; none: it has none."""
    return getattr(transformer, "_conditioning_names", ())


def conditioning_tensors(transformer: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> parameter of the conditioning's submodules; the tensors themselves."""
    roots = conditioning_names(transformer)
    return {n: p for n, p in transformer.named_parameters() if n.partition(".")[0] in roots}


def _submodule(transformer: nn.Module, path: str) -> nn.Module:
    try:
        return transformer.get_submodule(path)
    except AttributeError:
        wanted, got = f"a time embedder at {path}", f"a {type(transformer).__name__} without one"
        raise ArgumentError("TimeConditioning", "transformer", wanted, got, verb="have") from None


# What accelerate and diffusers hang on a module that is offloaded or cast.
_PLACEMENT = ("_hf_hook", "_old_forward", "forward", "_diffusers_hook", "_compiled_call_impl")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
          "_forward_pre_hooks_with_kwargs")  # fmt: skip


def plain_copy(first: nn.Module) -> nn.Module:
    """An embedder built anew: plain floating layers with the values of a live one, whatever it is wrapped in.

    Nothing of the live module's placement comes along: no hooks, no offloading, no quantised storage, no adapters.
    """
    base = getattr(first, "base_layer", None)
    if isinstance(base, nn.Module):
        return plain_copy(base)
    if hasattr(first, "in_features") and hasattr(first, "out_features"):
        weight, bias = (None if v is None else v.detach() for v in (first.weight, first.bias))  # type: ignore[operator]
        values = _values(first, "weight", weight)
        linear = nn.Linear(first.in_features, first.out_features, bias is not None, "meta", values.dtype)  # type: ignore[arg-type]
        linear.weight = nn.Parameter(values)
        if bias is not None:
            linear.bias = nn.Parameter(_values(first, "bias", bias))
        return linear
    second = first.__class__.__new__(first.__class__)
    second.__dict__ = {name: value for name, value in first.__dict__.items() if name not in _PLACEMENT}
    second.__dict__ |= {name: OrderedDict() for name in _HOOKS}
    second._modules = {name: module and plain_copy(module) for name, module in first._modules.items()}
    for kind in ("_parameters", "_buffers"):
        held = {n: v if v is None else _values(first, n, v.detach()) for n, v in getattr(first, kind).items()}
        wrapped = {n: v if v is None or kind == "_buffers" else nn.Parameter(v) for n, v in held.items()}
        second.__dict__[kind] = wrapped
    return second


def _values(module: nn.Module, name: str, held: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor's values as floating point, from where offloading keeps them."""
    stored = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if held.is_meta and stored is not None:
        held = stored[name]
    if hasattr(held, "dequantize") and type(held.data) is not torch.Tensor:
        held = held.dequantize()
    state = getattr(getattr(module, name), "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        held = dequantize_4bit(held, state)
    if not held.is_floating_point() or held.dtype.itemsize == 1:
        held = held.to(torch.float32)
    return held.clone()
