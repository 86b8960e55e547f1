"""`add_lora()`, `load_lora()`: peft adapters on a student's frozen base."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from twinflow.conditioning import LORA_MODE, conditioning_names, conditioning_tensors
from twinflow.errors import ArgumentError, require
from twinflow.formats.manifest import (
    LORA,
    REFUSAL,
    put_conditioning,
    read_manifest,
    read_settings,
    read_tensors,
    saved_conditioning,
)
from twinflow.sampling.grid import check_steps, is_number
from twinflow.suggest import did_you_mean, nearest
from twinflow.teachers.adapter_slot import adapter_layers, as_float32, enabled_adapters, on_meta

if TYPE_CHECKING:
    from twinflow.models.base import FlowModel

BASE = "base"  # the adapter that holds a user's own LoRA
_log = logging.getLogger(__name__)


def add_lora(
    student: "FlowModel",
    rank: int = 64,
    *,
    alpha: int | None = None,
    targets: tuple[str, ...] | None = None,
    adapter: str = "default",
    base_lora: str | Path | None = None,
    conditioning: str | None = LORA_MODE,
) -> "FlowModel":
    """Freezes a student and adds a trainable LoRA to it, and its conditioning where it has none.

    Adapters that are active already, such as a style by `load_lora_weights`, stay so with their weights and scales,
    frozen under student and teacher: what is trained is trained on what the pipeline draws. One that is switched off
    stays out of it.

    Args:
        student: from `twinflow.models.load`.
        rank, alpha: of the LoRA; alpha None: as the rank.
        targets: names of the layers, as peft matches them, each of one at least; None: the family's `lora_targets`.
        adapter: its name.
        base_lora: a LoRA file or folder of the user's own, frozen under student and teacher, in any of the formats
            that `load_lora_weights` of the family's pipeline reads (kohya's, ComfyUI's, ...).
        conditioning: mode for a student that has none yet; None: leaves it plain.

    Returns:
        The student. Adapter and conditioning are float32 whatever the base is.

    Raises:
        ValueError: the name is taken, a target that names no layer, a damaged file, an unsupported mode, or an adapter
            that is fused into the base or no LoRA.
    """
    network = student.network
    _check_new(network, adapter, rank, rank if alpha is None else alpha)
    rank = int(rank)
    if targets is not None:
        _require_each(network, targets)
    chosen = _targeted(network, student.lora_targets if targets is None else targets)
    base = None if base_lora is None else _readable_base(student, Path(base_lora).expanduser(), adapter)
    if conditioning is not None and student.conditioning is None:
        student.condition(conditioning)
    kept = dict.fromkeys(name for layer in adapter_layers(network).values() for name in enabled_adapters(layer))
    if base is not None:
        network.load_lora_adapter(**base, prefix=student.component, adapter_name=BASE)  # type: ignore[operator]
    student.transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=chosen)
    with torch.device("meta") if on_meta(network) else nullcontext():
        network.add_adapter(config, adapter)  # type: ignore[operator]
    layers = adapter_layers(network)
    added = [adapter] if base is None else [BASE, adapter]
    for layer in layers.values():
        layer.__dict__.update(_active_adapter=[*kept, *added], _disable_adapters=False)
    as_float32(layers, adapter)
    if kept:
        _log.info("add_lora: trains %r on top of the active adapters %s, which stay frozen", adapter, ", ".join(kept))
    if student.conditioning is not None:
        student.conditioning.requires_grad_()
    return student


def _check_new(network: nn.Module, adapter: str, rank: int, alpha: float) -> None:
    named = isinstance(adapter, str) and adapter and "." not in adapter
    require(named, "add_lora", "adapter", "a name without dots", repr(adapter))
    require(adapter not in adapter_names(network), "add_lora", "adapter", "a name that is not taken", repr(adapter))
    for layer in adapter_layers(network).values():
        hint = "call unfuse_lora(), or unload_lora_weights() to keep it in the base"
        require(not layer.merged, "add_lora", f"adapters {layer.merged_adapters}", "apart from the base", "fused", hint)
    for name, config in getattr(network, "peft_config", {}).items():
        hint = "delete_adapters() takes it off"
        require(config.peft_type == "LORA", "add_lora", f"adapter {name!r}", "a LoRA", config.peft_type.value, hint)
    check_steps("add_lora", "rank", rank)
    require(is_number(alpha) and alpha > 0, "add_lora", "alpha", "a number > 0", repr(alpha))


def _targeted(network: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear and convolution layers that the targets name; never the conditioning's own."""
    found = [name for name in _layer_names(network) if any(f".{name}".endswith(f".{target}") for target in targets)]
    require(found, "add_lora", "targets", f"layers of {type(network).__name__}", targets, verb="name")
    return found


def _require_each(network: nn.Module, targets: tuple[str, ...]) -> None:
    """Raises ArgumentError, naming them, for targets that name no layer: less would be trained than was asked for."""
    lost = [
        target for target in targets if not any(f".{name}".endswith(f".{target}") for name in _layer_names(network))
    ]
    tails = {name.split(".", k)[k] for name in _layer_names(network) for k in range(name.count(".") + 1)}
    hint = did_you_mean([repr(near) for target in lost for near in nearest(target, sorted(tails))[:1]])
    got = f"{', '.join(map(repr, lost))}, which names none"
    require(not lost, "add_lora", "targets", f"names of layers of {type(network).__name__}", got, hint)


def _layer_names(network: nn.Module) -> list[str]:
    """Full names of the linear and convolution layers, without the conditioning's own."""
    return [
        name.removesuffix(".base_layer")
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.partition(".")[0] not in conditioning_names(network)
    ]


def _readable_base(student: "FlowModel", path: Path, adapter: str) -> dict[str, Any]:
    """Weights and settings of a LoRA file of which every weight has a layer that it fits.

    diffusers passes over the names that it does not know, so that a style would be missing without a word.
    """
    free = adapter != BASE and BASE not in adapter_names(student.network)
    require(free, "add_lora", f"adapter {BASE!r}", "free for base_lora", "it taken")
    file = path / LORA if path.is_dir() else path
    tensors, alphas = diffusers_names("add_lora", "base_lora", student, read_tensors(file))
    check_layers("add_lora", "base_lora", student, tensors)
    settings = read_settings(file)
    alone = REFUSAL not in (settings or {}).values()
    require(alone, "add_lora", "base_lora", "a LoRA on its own", f"{file}, which needs a second embedder")
    scales = {"network_alphas": alphas} if alphas else {"metadata": settings}
    return {"pretrained_model_name_or_path_or_dict": tensors} | scales


def diffusers_names(
    function: str, argument: str, student: "FlowModel", tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A LoRA file's weights as `<component>.<layer>.lora_A.weight`, and alphas that are not part of them.

    Raises:
        ArgumentError: the family's pipeline class cannot read the file.
    """
    if student.pipeline_class is None or not tensors:
        return tensors, {}
    reader = student.pipeline().lora_state_dict
    try:
        read = reader(dict(tensors), return_alphas=True, unet_config=student.config)
    except Exception as error:  # whatever a converter meets in the names of another trainer
        brief = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        wanted = f"a LoRA that {student.pipeline_class} reads"
        raise ArgumentError(function, argument, wanted, brief) from error
    converted, alphas = (read, {}) if isinstance(read, dict) else read
    if not any("lora_A" in name for name in converted):
        converted = convert_unet_state_dict_to_peft(converted)
    return converted, alphas or {}


def check_layers(function: str, argument: str, student: "FlowModel", tensors: dict[str, torch.Tensor]) -> None:
    """Raises ArgumentError unless every weight of a LoRA file belongs to a layer of the network and has its width."""
    require(tensors, function, argument, "LoRA weights", "none", verb="hold")
    layers: dict[str, Any] = dict(student.network.named_modules())
    for name, value in tensors.items():
        inside = name.removeprefix(f"{student.component}.")
        owner, _, place = inside.rpartition(".lora_")
        axis = int(place.startswith("A"))  # lora_A is (rank, in), lora_B (out, rank)
        widths = ("in_features", "in_channels") if axis else ("out_features", "out_channels")
        width = next((getattr(layers[owner], w) for w in widths if hasattr(layers.get(owner), w)), None)
        if inside == name or width is None:
            wanted = f"layers of {type(student.network).__name__}, as {student.component}.<layer>.lora_A.weight"
            raise ArgumentError(function, argument, wanted, name, verb="name")
        if place in ("A.weight", "B.weight") and (value.dim() < 2 or value.shape[axis] != width):
            raise ArgumentError(function, name, f"of width {width} as its layer", tuple(value.shape))


def load_lora(student: "FlowModel", path: str | Path, adapter: str = "default") -> None:
    """Puts saved LoRA weights, and the conditioning beside them, into a student that has both, to go on training.

    Args:
        student: with an adapter of that name.
        path: a file, or a folder that export wrote.
        adapter: its name.

    Raises:
        ValueError: no such adapter, another rank, alpha or conditioning, other layers, or a damaged file; nothing is
            then changed.
    """
    file = Path(path).expanduser()
    file = file / LORA if file.is_dir() else file
    mine = lora_tensors(student.network, adapter)
    require(mine, "load_lora", "adapter", "one that the student has", repr(adapter))
    saved = {n.removeprefix(f"{student.component}."): value for n, value in read_tensors(file).items()}
    difference = f"a difference in {sorted(mine.keys() ^ saved.keys())[:3]}"
    require(mine.keys() == saved.keys(), "load_lora", f"{file}", "the adapter's layers", difference, verb="have")
    for name, value in mine.items():
        if value.shape != saved[name].shape:
            rank, got = (min(tensor.shape[:2]) for tensor in (value, saved[name]))
            raise ArgumentError("load_lora", f"{file}", f"of rank {rank}", f"rank {got} in {name}")
    alpha = (read_settings(file) or {}).get(f"{student.component}.lora_alpha")
    scale = student.network.peft_config[adapter].lora_alpha  # type: ignore[index, union-attr]
    require(alpha in (None, scale), "load_lora", f"{file}", f"of alpha {scale}", f"alpha {alpha}")
    _load_conditioning(student, file.parent)
    with torch.no_grad():
        for name, value in mine.items():
            value.copy_(saved[name])


def _load_conditioning(student: "FlowModel", folder: Path) -> None:
    manifest = read_manifest(folder)
    if manifest is None:
        return
    mode = None if student.conditioning is None else student.conditioning.mode
    wanted = f"conditioning {manifest.conditioning!r}, with which {folder} was trained"
    require(manifest.conditioning == mode, "load_lora", "student", wanted, repr(mode), verb="have")
    if conditioning_tensors(student.network):
        put_conditioning(student.network, saved_conditioning(folder, student.conditioning_roots()), "load_lora")


def adapter_names(network: nn.Module) -> set[str]:
    """The names of a network's peft adapters."""
    return set(getattr(network, "peft_config", None) or {})


def lora_tensors(network: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Name without the adapter's -> weight; the adapter's own tensors."""
    if adapter not in adapter_names(network):
        return {}
    named = dict(network.named_parameters())
    return get_peft_model_state_dict(network, state_dict=named, adapter_name=adapter)
