"""`deferrable_layers()`: the modulation layers of a student, once they are found fit to be deferred."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from twinflow.memory.quantised_linear import PackedWeight
from twinflow.models import FlowModel


def deferrable_layers(model: FlowModel) -> dict[str, nn.Linear]:
    """The modulation layers of a student by name within its network, in order of execution.

    Raises:
        ValueError: there are none, or they are not plain, frozen and whole.
    """
    layers: dict[str, Any] = model.modulation_layers()
    if not layers:
        raise ValueError(
            f"defer_modulation: student must have modulation layers that read its time embedding, got {model.family} "
            "without any: there is nothing to defer"
        )
    if getattr(model.config, "zero_cond_t", False):
        raise ValueError("defer_modulation: student must have one time embedding a row, got an edit model with two")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("defer_modulation: student must be whole on its device, got a sharded model")
    if any(p.requires_grad for layer in layers.values() for p in layer.parameters()):
        trained = [n for n, layer in layers.items() if any(p.requires_grad for p in layer.parameters())]
        raise ValueError(
            f"defer_modulation: modulation must be frozen, got training of {_named(trained)}; leave these layers out "
            "of the LoRA's targets (or freeze them), or do without deferring"
        )
    other = [n for n, layer in layers.items() if type(layer) is not nn.Linear or not _floating(layer.weight)]
    if other:
        layer = layers[other[0]]
        if isinstance(layer.weight, PackedWeight):
            raise ValueError(
                f"defer_modulation: modulation must be whole weights, got {layer.weight.packing.form} at "
                f"{_named(other)}; load again, and quantise with skip=student.modulation_layers(), as presets do"
            )
        raise ValueError(
            f"defer_modulation: modulation must be plain linear layers, got {type(layer).__name__} with "
            f"{layer.weight.dtype} at {_named(other)}; load it in bf16, and merge an adapter into the base"
        )
    return layers


def _floating(weight: torch.Tensor) -> bool:
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()


def _named(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def activation_before(network: nn.Module, name: str) -> nn.Module | None:
    """The module between the time embedding and a layer: `silu` beside it, or the one before it in a sequence.

    Args:
        network: the transformer.
        name: of the layer in it.
    """
    path, _, last = name.rpartition(".")
    holder = network.get_submodule(path)
    if isinstance(holder, nn.Sequential):
        return holder[int(last) - 1] if int(last) else None
    return getattr(holder, "silu", None)
