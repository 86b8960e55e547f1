"""`quantise_base()`: a student's frozen linear layers in int8 or nf4, under student and teacher alike."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from twinflow.errors import ArgumentError, require, require_type
from twinflow.memory.blocks import repeated_blocks
from twinflow.memory.quantised_linear import LIBRARIES, PackedWeight, load_library, pack

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantisedBase:
    """What `quantise_base` did to a model.

    Attributes:
        form: `nf4` or `int8`.
        layers: names of the layers that hold packed weights.
        bytes_before, bytes_after: of their weights, scales included.
    """

    form: str
    layers: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        before, after = (f"{size / 1e9:.2f} GB" for size in (self.bytes_before, self.bytes_after))
        return f"{self.form} base: {len(self.layers)} linear layers, {before} -> {after}"


def quantise_base(
    model: nn.Module, form: str = "nf4", *, device: torch.device | str | None = None, skip: Collection[str] = ()
) -> QuantisedBase:
    """Packs the weight of every frozen `nn.Linear` inside the repeated blocks, those under a LoRA included.

    A product is that with the weight which the packed one stands for, made anew in the input's dtype for each use and
    never kept: forward and backward have the bits of a plain layer with that weight. Biases stay as they are, and so do
    trained layers, adapters, conditioning and subclasses of `nn.Linear`. The weights change in their own Parameters:
    teachers that share them, made before or after, have the same base. Quantisation loses bits and cannot be undone;
    call it before or after `add_lora`, and load again for another form. Blocks may be compiled, without a graph break.

    In a `state_dict` a packed weight is `<layer>.weight`, a vector of uint8: nf4 codes, an 8-bit scale per 64 of them,
    a float32 scale per 256 of those, the scales' mean; or int8 codes and a float32 scale per row; each part padded to
    16 bytes. It loads into a model that was quantised in the same form.

    Args:
        model: the network, or a module around it: a `FlowModel`, or peft's wrapper.
        form: `nf4`, by bitsandbytes, 4.13 bits a value; or `int8`, by torchao, 8 bits and a float32 scale per output.
        device: where the layers are packed, one after the other, and stay with their biases, so that a model on the
            CPU never needs its full size there; all else stays, for `model.to(device)`. None: where they are.
        skip: names of linear layers, as in `model.named_modules()`, that are left as they are.

    Returns:
        What was packed.

    Raises:
        ImportError: bitsandbytes or torchao is missing.
        TypeError: model is no module, or skip is one name.
        ValueError: an unknown form, a name in skip that no linear layer has, no frozen linear layer, a layer whose
            forward is replaced, or weights that are quantised already, sharded, on meta or of another dtype; nothing
            is then changed.
    """
    require_type(isinstance(model, nn.Module), "quantise_base", "model", "an nn.Module", type(model).__name__)
    require(form in LIBRARIES, "quantise_base", "form", f"one of {', '.join(LIBRARIES)}", repr(form))
    _check_skip(model, skip)
    layers = {name: layer for name, layer in _frozen(model) if name.removesuffix(".base_layer") not in _plain(skip)}
    wanted = "a frozen linear layer in its repeated blocks that is not skipped"
    require(layers, "quantise_base", "model", wanted, "none", "freeze the base: add a LoRA first", verb="have")
    for name, layer in layers.items():
        _check_layer(name, layer)
    load_library(LIBRARIES[form], "quantise_base")
    weights = {id(layer.weight): layer.weight for layer in layers.values()}
    before = sum(weight.numel() * weight.element_size() for weight in weights.values())
    for layer in layers.values():
        if not isinstance(layer.weight, PackedWeight):  # layers may share one
            pack(layer.weight, form, device)
        if layer.bias is not None and device is not None:
            layer.bias.data = layer.bias.data.to(device)
    return QuantisedBase(form, tuple(layers), before, sum(weight.numel() for weight in weights.values()))


def quantised_form(model: nn.Module) -> str | None:
    """The form of a model's quantised base; None: it has none."""
    return next((p.packing.form for p in model.parameters() if isinstance(p, PackedWeight)), None)


def _plain(names: Collection[str]) -> set[str]:
    return {name.removesuffix(".base_layer") for name in names}


def _check_skip(model: nn.Module, skip: Collection[str]) -> None:
    require_type(not isinstance(skip, str), "quantise_base", "skip", "a collection of names", repr(skip))
    linear = _plain([name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
    unknown = sorted(_plain(skip) - linear)
    if unknown:
        raise ArgumentError("quantise_base", "skip", "linear layers of the model", repr(unknown[0]), verb="name")


def _frozen(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Name within the model -> frozen linear layer of the base, block by block.

    Raises:
        ValueError: a layer's weight is quantised already.
    """
    for block_name, block in repeated_blocks(model).items():
        adapters = {id(inside) for module in block.modules() for inside in _adapters(module)}
        for name, module in block.named_modules(prefix=block_name):
            if id(module) in adapters:
                continue
            _refuse_quantised(name, module)
            if type(module) is nn.Linear and not module.weight.requires_grad:
                yield name, module


def _adapters(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a peft layer's adapters."""
    for place in getattr(module, "adapter_layer_names", ()):
        held = getattr(module, place, None)
        if isinstance(held, nn.Module):
            yield from held.modules()


def _refuse_quantised(name: str, module: nn.Module) -> None:
    weight = getattr(module, "weight", None) if not hasattr(module, "base_layer") else None
    if not isinstance(weight, torch.Tensor) or isinstance(weight, DTensor):
        return
    if isinstance(weight, PackedWeight):
        got = f"{name} in {weight.packing.form} already"
        raise ArgumentError("quantise_base", "model", "quantised once", got, "load it again")
    if type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point() and weight.element_size() > 1:
        return
    origins = [type(part).__module__.partition(".")[0] for part in (weight, module)]
    origin = next((origin for origin in origins if origin != "torch"), f"its owner, as {weight.dtype}")
    got = f"{name} quantised by {origin} ({type(weight).__name__} in {type(module).__name__})"
    hint = "load it in bf16 and let quantise_base pack it"
    raise ArgumentError("quantise_base", "model", "plain floating weights", got, hint, verb="have")


def _check_layer(name: str, layer: nn.Linear) -> None:
    weight = layer.weight
    for wrong, wanted, got, hint in (
        ("forward" in vars(layer), "its own forward", "another, as of deferred modulation", "name it in skip"),
        (isinstance(weight, DTensor), "a whole weight", "a sharded one", "quantise before sharding"),
        (weight.is_meta, "a weight with values", "one on the meta device", "load it first"),
        (weight.dtype not in _DTYPES, "a weight in float32, bfloat16 or float16", f"{weight.dtype}", ""),
    ):
        require(not wrong, "quantise_base", name, wanted, got, hint, verb="have")
