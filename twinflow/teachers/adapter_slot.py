"""`AdapterSlot`: a teacher's weights beside the student's on one base: a second peft adapter, or none.

A call with these weights points each adapter layer at another slot for as long as it runs: no copy of the base, no
change of `requires_grad`, no walk over all modules (80 ms on Qwen-Image). Trainable tensors outside adapters, such as a
second time embedder, are exchanged in their modules the same way.
"""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from twinflow.adapters import compute_in_input_dtype
from twinflow.distributed import unwrap, without_collectives
from twinflow.errors import require
from twinflow.interface import Student, TeacherWeights, plain_name
from twinflow.teachers.sharded_weights import ShardedWeights, is_sharded


def adapter_layers(module: nn.Module) -> dict[str, BaseTunerLayer]:
    """Name -> peft layer."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def adapter_parameters(layer: BaseTunerLayer, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter in a layer, by the name of their place: `lora_A.weight`, `lora_B.weight`, ..."""
    found = {}
    for place in layer.adapter_layer_names:
        held = getattr(layer, place, {})
        if adapter not in held:
            continue
        if isinstance(held[adapter], nn.Parameter):
            found[place] = held[adapter]
        else:
            found |= {f"{place}.{name}": p for name, p in held[adapter].named_parameters()}
    return found


def enabled_adapters(layer: BaseTunerLayer) -> list[str]:
    """The adapters that a layer computes with, in order: none where they are switched off."""
    return [] if layer.disable_adapters else list(layer.active_adapters)


def trained_adapter(layers: dict[str, BaseTunerLayer], where: str) -> str:
    """The name of the one active adapter that is trained.

    Raises:
        ValueError: none or several are, or it is not floating point.
    """
    names = {
        adapter
        for layer in layers.values()
        for adapter in layer.active_adapters
        if any(p.requires_grad for p in adapter_parameters(layer, adapter).values())
    }
    require(len(names) == 1, where, "student", "one adapter", ", ".join(sorted(names)) or "none", verb="train")
    return names.pop()


# What a LoRA's configuration may ask for that no LoRA file holds: setting -> what it is.
_BESIDE_LORA = {
    "modules_to_save": "whole layers that are trained", "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRAs of parameters that are no layers", "layer_replication": "repeated layers",
    "alora_invocation_tokens": "activation by tokens", "use_qalora": "QA-LoRA", "use_bdlora": "BD-LoRA",
    "arrow_config": "a router", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA", "velora_config": "VeLoRA",
}  # fmt: skip
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def require_stock_base(function: str, config: Any) -> None:
    """Raises ArgumentError where an adapter's initialisation has changed the weights of the base beneath it.

    Without the adapter, and under the adapter on a stock base, such a model is another than the one that was trained.
    """
    start = getattr(config, "init_lora_weights", True)
    changed = isinstance(start, str) and start.lower().startswith(_BASE_CHANGING)
    hint = "PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take a part of the base into the adapter"
    wanted = "True, or one that leaves the base's weights as they are"
    require(not changed, function, "init_lora_weights of the trained adapter", wanted, repr(start), hint)


def require_lora_alone(function: str, config: Any) -> None:
    """Raises ArgumentError where an adapter trains more than a LoRA file holds, such as biases or whole layers."""
    require_stock_base(function, config)
    require(config.peft_type == "LORA", function, "the trained adapter", "a LoRA", config.peft_type)
    hint = "a stock pipeline loads LoRA weights only; raise the rank, or name more target_modules"
    bias = config.bias
    require(bias == "none", function, "bias of the trained adapter", "'none'", repr(bias), hint)
    for setting, what in _BESIDE_LORA.items():
        value = getattr(config, setting, None)
        require(not value, function, f"{setting} of the trained adapter", "unset", f"{value!r} ({what})", hint)


class AdapterSlot(TeacherWeights):
    """A second set of adapter weights on the student's own base.

    Args:
        student: a module with peft adapters, wrapped or not; a sharded one for a slot without adapters only.
        adapter: name of the new adapter that holds the copies; None: adapters are off in this slot, and what is
            trained outside them is kept as it is now.

    Raises:
        ValueError: the name is taken, or not exactly one adapter is trained.
    """

    def __init__(self, student: nn.Module, adapter: str | None) -> None:
        self._student = student
        original = unwrap(student)
        assert isinstance(original, nn.Module)
        layers = adapter_layers(original)
        trained = trained_adapter(layers, "EMATeacher" if adapter else "FrozenTeacher")
        _require_saveable("EMATeacher" if adapter else "FrozenTeacher", original, trained)
        active = {id(layer): list(layer.active_adapters) for layer in layers.values()}
        free = adapter is None or all(adapter not in x._all_available_adapter_names() for x in layers.values())
        require(free, "EMATeacher", "adapter", "a name that is not taken", repr(adapter))
        adapters = {id(p) for layer in layers.values() for p in adapter_parameters(layer, trained).values()}
        self._shards = ShardedWeights(student, adapters) if is_sharded(student) else None
        if self._shards is None:
            as_float32(layers, trained)
        if adapter is not None:
            _add_like(original, layers, trained, adapter)
        mine = [adapter] if adapter else []
        self._layers = [
            (layer, [name for a in active[id(layer)] for name in (mine if a == trained else [a])])
            for layer in layers.values()
        ]
        names = {id(p): plain_name(name) for name, p in original.named_parameters()}
        self.sources: dict[str, nn.Parameter] = {} if self._shards is None else self._shards.sources
        self.targets: dict[str, torch.Tensor] = {} if self._shards is None else self._shards.targets
        for layer in layers.values() if adapter else ():
            theirs = adapter_parameters(layer, trained)
            for place, copied in adapter_parameters(layer, adapter or "").items():
                if theirs[place].requires_grad:
                    self.sources[names[id(theirs[place])]] = theirs[place]
                    self.targets[names[id(theirs[place])]] = copied
        self._exchanged = self._others(original, adapters, names) if self._shards is None else []

    def _others(
        self, original: nn.Module, adapters: set[int], names: dict[int, str]
    ) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Copies of trainable parameters outside adapters: (module, attribute, copy)."""
        copies: dict[int, nn.Parameter] = {}
        found = []
        for module in original.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is None or not parameter.requires_grad or id(parameter) in adapters:
                    continue
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                    name = names[id(parameter)]
                    self.sources[name], self.targets[name] = parameter, copies[id(parameter)]
                found.append((module, attribute, copies[id(parameter)]))
        return found

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes the student's module compute with this slot's weights; the student's are back afterwards."""
        adapters = [layer._active_adapter for layer, _ in self._layers]
        parameters = [module._parameters[attribute] for module, attribute, _ in self._exchanged]
        try:
            for layer, names in self._layers:
                layer.__dict__["_active_adapter"] = names
            for module, attribute, mine in self._exchanged:
                module._parameters[attribute] = mine
            with nullcontext() if self._shards is None else self._shards.active():
                yield
        finally:
            for (layer, _), before in zip(self._layers, adapters, strict=True):
                layer.__dict__["_active_adapter"] = before
            for (module, attribute, _), theirs in zip(self._exchanged, parameters, strict=True):
                module._parameters[attribute] = theirs

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Any) -> torch.Tensor:
        network: Student = without_collectives(self._student)
        with self.active():
            return network(x_t, t, r, cond)

    def settle(self) -> None:
        if self._shards is not None:
            self._shards.settle()


def _owner(original: nn.Module, adapter: str) -> tuple[str, Any]:
    """Name and module of the innermost holder of an adapter's configuration: wrappers around it share the dict."""
    return [(n, m) for n, m in original.named_modules() if adapter in vars(m).get("peft_config", ())][-1]


def _require_saveable(function: str, original: nn.Module, adapter: str) -> None:
    """Raises ArgumentError for an adapter that could not be used once it is trained.

    peft itself saves and loads more than LoRA weights; diffusers does not.
    """
    config = _owner(original, adapter)[1].peft_config[adapter]
    require_stock_base(function, config)
    wrapped = any(isinstance(module, PeftModel) for module in original.modules())
    diffusers_own = not wrapped and hasattr(_owner(original, adapter)[1], "load_lora_adapter")
    if diffusers_own and config.peft_type == "LORA":
        require_lora_alone(function, config)


def on_meta(module: nn.Module) -> bool:
    """Whether a module has no data, as in a memory forecast; peft would put its adapters on the CPU."""
    return next(module.parameters()).is_meta


def as_float32(layers: dict[str, BaseTunerLayer], adapter: str) -> None:
    """Widens an adapter's half-precision weights in place, as their updates would round to zero in it.

    They compute in the dtype of their input all the same.
    """
    for layer in layers.values():
        for parameter in adapter_parameters(layer, adapter).values():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        compute_in_input_dtype(layer)


def _add_like(original: nn.Module, layers: dict[str, BaseTunerLayer], trained: str, adapter: str) -> None:
    """Adds an adapter on the layers that have the trained one, with its values, and leaves all else as it was."""
    requires_grad = {parameter: parameter.requires_grad for parameter in original.parameters()}
    switched = (BaseTunerLayer, AuxiliaryTrainingWrapper)  # the latter hold what `modules_to_save` names
    active = [(module, module._active_adapter) for module in original.modules() if isinstance(module, switched)]
    prefix, owner = _owner(original, trained)
    config = copy.deepcopy(owner.peft_config[trained])
    names = [n.removeprefix(f"{prefix}.") for n, layer in layers.items() if adapter_parameters(layer, trained)]
    # A pattern matches whole names; of a list also the layers whose names end with one of them would match.
    config.target_modules = "|".join(re.escape(name) for name in names)
    config.modules_to_save, config.inference_mode, config.init_lora_weights = None, True, True
    if getattr(config, "bias", "none") != "none":
        config.bias = "none"  # trained biases are exchanged with all else that is trained outside adapters
    for setting in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if getattr(config, setting, None) is not None:
            setattr(config, setting, None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, owner, adapter, low_cpu_mem_usage=on_meta(original))
    finally:
        for module, before in active:
            module.__dict__["_active_adapter"] = before
        for parameter, required in requires_grad.items():
            parameter.requires_grad_(required)
    as_float32(layers, adapter)
    with torch.no_grad():
        for layer in layers.values():
            theirs = adapter_parameters(layer, trained)
            for place, parameter in adapter_parameters(layer, adapter).items():
                parameter.requires_grad_(False).copy_(theirs[place])
