"""`add_lora()`, `load_lora()`: peft adapters on a student's frozen base."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from twinflow.adapter_slot import adapter_layers, adapter_parameters, as_float32
from twinflow.conditioning import LORA_MODE
from twinflow.manifest import read_tensors

if TYPE_CHECKING:
    from twinflow.models.base import FlowModel

BASE = "base"  # the adapter that holds a user's own LoRA
PREFIX = "transformer."  # of the keys in a pipeline's LoRA files
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' default


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
    taken = getattr(network, "peft_config", None) or {}
    if adapter in taken:
        raise ValueError(f"add_lora: adapter must be a name that is not taken, got {adapter!r}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"add_lora: rank must be an integer >= 1, got {rank!r}")
    chosen = _targeted(network, student.lora_targets if targets is None else targets)
    if base_lora is not None:
        _add_base(student, Path(base_lora), taken)
    if conditioning is not None and student.conditioning is None:
        student.condition(conditioning)
    student.transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=chosen)
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


def _targeted(network: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear and convolution layers that the targets name; never the conditioning's own."""
    from twinflow.manifest import SECOND_EMBEDDERS

    found = [
        name.removesuffix(".base_layer")
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.partition(".")[0] not in SECOND_EMBEDDERS
        and any(f".{name.removesuffix('.base_layer')}".endswith(f".{target}") for target in targets)
    ]  # fmt: skip
    if not found:
        raise ValueError(f"add_lora: targets must name layers of {type(network).__name__}, got {targets}")
    return found


def _add_base(student: "FlowModel", path: Path, taken: dict[str, object]) -> None:
    if BASE in taken:
        raise ValueError(f"add_lora: adapter {BASE!r} must be free for base_lora, got it taken")
    file = path / LORA_FILE if path.is_dir() else path
    tensors = read_tensors(file)
    student.network.load_lora_adapter(tensors, prefix=student.component, adapter_name=BASE)  # type: ignore[operator]


def load_lora(student: "FlowModel", path: str | Path, adapter: str = "default") -> None:
    """Puts saved LoRA weights into an adapter that the student has, to go on training.

    Args:
        student: with an adapter of that name.
        path: a file, or a folder that export wrote.
        adapter: its name.

    Raises:
        ValueError: no such adapter, another rank or other layers, or a damaged file; nothing is then changed.
    """
    file = Path(path)
    file = file / LORA_FILE if file.is_dir() else file
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
    with torch.no_grad():
        for name, value in mine.items():
            value.copy_(saved[name])


def lora_tensors(network: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Name without the adapter's -> weight; the adapter's own tensors."""
    if adapter not in (getattr(network, "peft_config", None) or {}):
        return {}
    named = dict(network.named_parameters())
    return get_peft_model_state_dict(network, state_dict=named, adapter_name=adapter)
