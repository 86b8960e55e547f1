"""`deferrable_layers()`: the modulation layers of a student, once they are found fit to be deferred."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from twinflow.errors import ArgumentError, require
from twinflow.memory.quantised_linear import PackedWeight
from twinflow.models import FlowModel


def deferrable_layers(model: FlowModel) -> dict[str, nn.Linear]:
    """The modulation layers of a student by name within its network, in order of execution.

    Raises:
        ValueError: there are none, or they are not plain, frozen and whole.
    """
    layers: dict[str, Any] = model.modulation_layers()
    where, wanted = "defer_modulation", "modulation layers that read its time embedding"
    require(layers, where, "student", wanted, f"{model.family} without any", verb="have")
    one_time = not getattr(model.config, "zero_cond_t", False)
    require(one_time, where, "student", "one time embedding a row", "an edit model with two", verb="have")
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    require(not sharded, where, "student", "whole on its device", "a sharded model")
    trained = [n for n, layer in layers.items() if any(p.requires_grad for p in layer.parameters())]
    if trained:
        hint = "leave these layers out of the LoRA's targets, freeze them, or do without deferring"
        raise ArgumentError(where, "modulation", "frozen", f"training of {_named(trained)}", hint)
    other = [n for n, layer in layers.items() if type(layer) is not nn.Linear or not _floating(layer.weight)]
    if other:
        layer, at = layers[other[0]], f"at {_named(other)}"
        if isinstance(layer.weight, PackedWeight):
            hint = "load again, and quantise with skip=student.modulation_layers(), as presets do"
            raise ArgumentError(where, "modulation", "whole weights", f"{layer.weight.packing.form} {at}", hint)
        got = f"{type(layer).__name__} with {layer.weight.dtype} {at}"
        hint = "load it in bf16, and merge an adapter into the base"
        raise ArgumentError(where, "modulation", "plain linear layers", got, hint)
    return layers


def _floating(weight: torch.Tensor) -> bool:
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()


def _named(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def activation_before(network: nn.Module, name: str) -> nn.Module | None:
    """The module between the time embedding and a layer: `silu` beside it, or the one before it in a sequence."""
    path, _, last = name.rpartition(".")
    holder = network.get_submodule(path)
    if isinstance(holder, nn.Sequential):
        return holder[int(last) - 1] if int(last) else None
    return getattr(holder, "silu", None)
