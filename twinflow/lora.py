"""`add_lora()`, `load_lora()`: peft adapters on a student's frozen base."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from twinflow.conditioning import LORA_MODE, conditioning_names, conditioning_tensors
from twinflow.formats.manifest import (
    LORA,
    REFUSAL,
    put_conditioning,
    read_manifest,
    read_settings,
    read_tensors,
    saved_conditioning,
)
from twinflow.teachers.adapter_slot import adapter_layers, adapter_parameters, as_float32, on_meta

if TYPE_CHECKING:
    from twinflow.models.base import FlowModel

BASE = "base"  # the adapter that holds a user's own LoRA


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

    Args:
        student: from `twinflow.models.load`.
        rank, alpha: of the LoRA; alpha None: as the rank.
        targets: names of the layers, as peft matches them; None: the family's `lora_targets`.
        adapter: its name.
        base_lora: a LoRA file or folder of the user's own, frozen under student and teacher.
        conditioning: mode for a student that has none yet; None: leaves it plain.

    Returns:
        The student. Adapter and conditioning are float32 whatever the base is.

    Raises:
        ValueError: the name is taken, no layer matches, a file is damaged, or an unsupported mode.
    """
    network = student.network
    _check_new(network, adapter, rank, rank if alpha is None else alpha)
    chosen = _targeted(network, student.lora_targets if targets is None else targets)
    base = None if base_lora is None else _readable_base(student, Path(base_lora), adapter)
    if conditioning is not None and student.conditioning is None:
        student.condition(conditioning)
    if base is not None:
        student.network.load_lora_adapter(**base, prefix=student.component, adapter_name=BASE)  # type: ignore[operator]
    student.transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=chosen)
    with torch.device("meta") if on_meta(network) else nullcontext():
        network.add_adapter(config, adapter)  # type: ignore[operator]
    layers = adapter_layers(network)
    for layer in layers.values():
        layer._active_adapter = [BASE, adapter] if base_lora is not None else [adapter]
        for parameter in adapter_parameters(layer, BASE).values():
            parameter.requires_grad_(False)
    as_float32(layers, adapter)
    if student.conditioning is not None:
        student.conditioning.requires_grad_()
    return student


def _check_new(network: nn.Module, adapter: str, rank: int, alpha: float) -> None:
    if not isinstance(adapter, str) or not adapter or "." in adapter:
        raise ValueError(f"add_lora: adapter must be a name without dots, got {adapter!r}")
    if adapter in (getattr(network, "peft_config", None) or {}):
        raise ValueError(f"add_lora: adapter must be a name that is not taken, got {adapter!r}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"add_lora: rank must be an integer >= 1, got {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not alpha > 0:
        raise ValueError(f"add_lora: alpha must be a number > 0, got {alpha!r}")


def _targeted(network: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear and convolution layers that the targets name; never the conditioning's own."""
    found = [
        name.removesuffix(".base_layer")
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.partition(".")[0] not in conditioning_names(network)
        and any(f".{name.removesuffix('.base_layer')}".endswith(f".{target}") for target in targets)
    ]  # fmt: skip
    if not found:
        raise ValueError(f"add_lora: targets must name layers of {type(network).__name__}, got {targets}")
    return found


def _readable_base(student: "FlowModel", path: Path, adapter: str) -> dict[str, Any]:
    """Weights and settings of a LoRA file of which every weight has a layer that it fits.

    diffusers passes over the names that it does not know, so that a style would be missing without a word.
    """
    if adapter == BASE or BASE in (getattr(student.network, "peft_config", None) or {}):
        raise ValueError(f"add_lora: adapter {BASE!r} must be free for base_lora, got it taken")
    file = path / LORA if path.is_dir() else path
    tensors, layers = read_tensors(file), dict(student.network.named_modules())
    for name, value in tensors.items():
        inside = name.removeprefix(f"{student.component}.")
        owner, found, place = inside.rpartition(".lora_")
        layer: Any = layers.get(owner)
        if inside == name or not found or not isinstance(layer, (nn.Linear, nn.Conv2d, BaseTunerLayer)):
            wanted = f"diffusers' names, {student.component}.<layer>.lora_A.weight, of {type(student.network).__name__}"
            raise ValueError(f"add_lora: base_lora must have {wanted}, got {name} in {file}")
        axis = int(place[:1] == "A")  # lora_A is (rank, in), lora_B (out, rank)
        widths = ("in_features", "in_channels") if axis else ("out_features", "out_channels")
        width = next((getattr(layer, w) for w in widths if hasattr(layer, w)), None)
        if place in ("A.weight", "B.weight") and (value.dim() < 2 or value.shape[axis] != width):
            raise ValueError(f"add_lora: {name} must be of width {width} as its layer, got {tuple(value.shape)}")
    if not tensors:
        raise ValueError(f"add_lora: base_lora must hold weights, got none in {file}")
    settings = read_settings(file)
    if REFUSAL in (settings or {}).values():
        raise ValueError(f"add_lora: base_lora must be a LoRA on its own, got {file}, which needs a second embedder")
    return {"pretrained_model_name_or_path_or_dict": tensors, "metadata": settings}


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
    file = Path(path)
    file = file / LORA if file.is_dir() else file
    mine = lora_tensors(student.network, adapter)
    if not mine:
        raise ValueError(f"load_lora: adapter must be one that the student has, got {adapter!r}")
    saved = {n.removeprefix(f"{student.component}."): value for n, value in read_tensors(file).items()}
    if mine.keys() != saved.keys():
        difference = sorted(mine.keys() ^ saved.keys())
        raise ValueError(f"load_lora: {file} must have the adapter's layers, got a difference in {difference[:3]}")
    for name, value in mine.items():
        if value.shape != saved[name].shape:
            rank, got = (min(tensor.shape[:2]) for tensor in (value, saved[name]))
            raise ValueError(f"load_lora: {file} must be of rank {rank}, got rank {got} in {name}")
    alpha, scale = (read_settings(file) or {}).get(f"{student.component}.lora_alpha"), _alpha(student.network, adapter)
    if alpha not in (None, scale):
        raise ValueError(f"load_lora: {file} must be of alpha {scale}, got alpha {alpha}")
    _load_conditioning(student, file.parent)
    with torch.no_grad():
        for name, value in mine.items():
            value.copy_(saved[name])


def _load_conditioning(student: "FlowModel", folder: Path) -> None:
    manifest = read_manifest(folder)
    if manifest is None:
        return
    mode = None if student.conditioning is None else student.conditioning.mode
    if manifest.conditioning != mode:
        wanted = f"conditioning {manifest.conditioning!r}, with which {folder} was trained"
        raise ValueError(f"load_lora: student must have {wanted}, got {mode!r}")
    if conditioning_tensors(student.network):
        put_conditioning(student.network, saved_conditioning(folder, student.conditioning_roots()), "load_lora")


def _alpha(network: nn.Module, adapter: str) -> float:
    return network.peft_config[adapter].lora_alpha  # type: ignore[index, union-attr]


def lora_tensors(network: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Name without the adapter's -> weight; the adapter's own tensors."""
    if adapter not in (getattr(network, "peft_config", None) or {}):
        return {}
    named = dict(network.named_parameters())
    return get_peft_model_state_dict(network, state_dict=named, adapter_name=adapter)
