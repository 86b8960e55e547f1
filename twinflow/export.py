"""`export()`: what was trained as files for stock diffusers pipelines and for ComfyUI."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from twinflow.conditioning import SIGN_TABLE, conditioning_tensors
from twinflow.distributed import unwrap
from twinflow.errors import ArgumentError, ArgumentTypeError, require, require_type
from twinflow.formats import comfyui
from twinflow.formats.export_folder import check_folder, new_export
from twinflow.formats.generation_config import GenerationConfig
from twinflow.formats.manifest import (
    ADAPTER_SETTINGS,
    COMFYUI_LORA,
    COMFYUI_MODEL,
    LAYOUTS,
    REFUSAL,
    Manifest,
    marked,
    write_conditioning,
)
from twinflow.interface import Student, plain_name, plain_names
from twinflow.memory.quantised_base import quantised_form
from twinflow.models.base import FlowModel, without_peft
from twinflow.models.registry import FAMILIES
from twinflow.teachers.adapter_slot import adapter_layers, enabled_adapters, require_lora_alone, trained_adapter
from twinflow.teachers.teachers import EMATeacher

_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias")


def export(
    student: Student,
    folder: str | Path,
    *,
    teacher: EMATeacher | None = None,
    format: str = "diffusers",
    merge_base: bool = False,
    usage: GenerationConfig | None = None,
) -> Path:
    """Saves what a student trained: its LoRA, or the whole transformer where no adapter was trained.

    A LoRA is written as diffusers writes one, and `pipe.load_lora_weights(folder)` takes it. Weights of a `dual` mode
    need their second embedder, saved beside them: a stock pipeline refuses them, `twinflow.attach(pipe, folder)` takes
    them. The files appear in the folder together, once all are written.

    Args:
        student: from `twinflow.models.load`, wrapped or not.
        folder: new, or with an earlier export, which is replaced; other files in it stay.
        teacher: export its averages instead of the student's weights, under the same names.
        format: `diffusers`; or `comfyui`, whose key names ComfyUI reads, for Qwen-Image and Z-Image.
        merge_base: one LoRA of the trained one and the frozen ones beneath it, of `add_lora(base_lora=...)` or active
            before; False: the trained one.
        usage: what `twinflow sample` is to know: the pipeline underneath, steps, size.

    Returns:
        The folder.

    Raises:
        TypeError: the student is not from `twinflow.models.load`, or the teacher is no EMATeacher.
        ValueError: a family without that format, nothing to merge, a teacher of another student, a folder that is a
            file or holds weights of another origin, an adapter that is not a LoRA, or sharded weights.
    """
    model, teacher_model = _checked(student, teacher)
    kind = "lora" if adapter_layers(model) else "full"
    require(format in LAYOUTS, "export", "format", f"one of {', '.join(LAYOUTS)}", repr(format))
    if format == "comfyui" and not model.comfyui:
        known = ", ".join(name for name, family in FAMILIES.items() if family.comfyui)
        raise ArgumentError("export", "format 'comfyui'", f"a student of {known}", model.family, verb="have")
    mode = None if model.conditioning is None else model.conditioning.mode
    manifest = Manifest(model.family, mode, kind, "student" if teacher is None else "ema", format, usage=usage)
    path = Path(folder).expanduser()
    check_folder(path, manifest)
    require(
        not merge_base or _beneath(_network(model)),
        "export",
        "merge_base",
        "False for a student without a base_lora",
        True,
    )
    weights = _lora(model, teacher, merge_base) if kind == "lora" else None
    with new_export(path, manifest) as partial:
        if weights is not None:
            _write_lora(weights, model, manifest, partial)
        else:
            _write_model(model if teacher_model is None else teacher_model, manifest, partial)
    return path


def _checked(student: Student, teacher: EMATeacher | None) -> tuple[FlowModel, FlowModel | None]:
    """The student's model, and the teacher's where it is a copy of its own."""
    model = unwrap(student)
    if not isinstance(model, FlowModel):
        raise ArgumentTypeError("export", "student", "made by twinflow.models.load", type(model).__name__)
    if model.pipeline_class is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.pipeline_class)
        raise ArgumentError("export", "student", f"of one of {known}", repr(model.family), "save its state_dict()")
    whole = not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    require(whole, "export", "student", "whole weights", "sharded ones", "gather them first", "hold")
    form = None if adapter_layers(model) else quantised_form(model)
    hint = "train a LoRA, which is exported alone, or load in bf16"
    require(form is None, "export", "student", "whole weights", f"a base in {form}", hint, "hold")
    if teacher is None:
        return model, None
    averaged = isinstance(teacher, EMATeacher)
    require_type(averaged, "export", "teacher", "an EMATeacher or None", type(teacher).__name__)
    teacher.check(student)
    return model, getattr(teacher, "module", None)


def _network(model: FlowModel) -> Any:
    """The diffusers module inside every wrapper."""
    return unwrap(without_peft(unwrap(model.transformer)))


@dataclass(frozen=True)
class _Lora:
    """A LoRA to be written: `<layer>.lora_A.weight`, ... -> weight, its configuration, and layer -> scaling."""

    component: str
    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]
    scalings: dict[str, float]
    conditioning: dict[str, torch.Tensor]


def _lora(model: FlowModel, teacher: EMATeacher | None, merge_base: bool) -> _Lora:
    network = _network(model)
    averages = {} if teacher is None else teacher.parameters()
    trained = {
        id(p): averages[name] for name, p in plain_names(dict(model.named_parameters())).items() if name in averages
    }
    named = {name: trained.get(id(p), p) for name, p in network.named_parameters()}
    adapter = trained_adapter(adapter_layers(network), "export")
    tensors, scalings = _adapter(network, named, adapter)
    config = network.peft_config[adapter]
    settings = {name: getattr(config, name) for name in _SETTINGS if hasattr(config, name)}
    if merge_base:
        tensors, rank = merged([*(_adapter(network, named, name) for name in _beneath(network)), (tensors, scalings)])
        settings = {"r": rank, "lora_alpha": rank}
        scalings = {name.rpartition(".lora_")[0]: 1.0 for name in tensors}
    conditioning = {name: trained.get(id(p), p) for name, p in conditioning_tensors(network).items()}
    return _Lora(model.component, tensors, settings, scalings, conditioning)


def _beneath(network: Any) -> list[str]:
    """The frozen adapters that a network computes with beside the trained one, in order."""
    layers = adapter_layers(network)
    active = dict.fromkeys(name for layer in layers.values() for name in enabled_adapters(layer))
    return [name for name in active if name != trained_adapter(layers, "export")]


def _adapter(
    network: Any, named: dict[str, torch.Tensor], adapter: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """An adapter's weights without its name in theirs, and its factor in each layer."""
    config = network.peft_config[adapter]
    require_lora_alone("export", config)
    found = get_peft_model_state_dict(network, state_dict=named, adapter_name=adapter)
    tensors = {plain_name(name): value.detach().cpu().contiguous() for name, value in found.items()}
    layers: dict[str, Any] = {plain_name(name): layer for name, layer in adapter_layers(network).items()}
    return tensors, {n: layer.scaling[adapter] for n, layer in layers.items() if adapter in layer.scaling}


def merged(
    adapters: list[tuple[dict[str, torch.Tensor], dict[str, float]]],
) -> tuple[dict[str, torch.Tensor], int]:
    """Several LoRAs as one of the same sum: ranks side by side, scalings in B, zeros where a layer has fewer.

    Args:
        adapters: the weights `<layer>.lora_A.weight` (r, in, ...) and `<layer>.lora_B.weight` (out, r, ...) of each,
            and layer -> scaling.

    Returns:
        The weights, of one rank in every layer and scaling 1, and that rank.

    Raises:
        ValueError: an adapter has other weights than these two.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for tensors, scalings in adapters:
        for name, value in tensors.items():
            layer, _, place = name.rpartition(".lora_")
            plain = place in ("A.weight", "B.weight")
            require(plain, "export", "merge_base", f"False for an adapter with {name}", True)
            parts.setdefault(name, []).append(value.float() * (scalings[layer] if place == "B.weight" else 1.0))
    joined = {name: torch.cat(values, int(name.endswith("B.weight"))) for name, values in parts.items()}
    rank = max(value.shape[0] for name, value in joined.items() if name.endswith("A.weight"))
    for name, value in joined.items():
        axis = int(name.endswith("B.weight"))
        missing = list(value.shape)
        missing[axis] = rank - value.shape[axis]
        joined[name] = torch.cat([value, value.new_zeros(missing)], axis)
    return joined, rank


def _write_lora(lora: _Lora, model: FlowModel, manifest: Manifest, folder: Path) -> None:
    settings = lora.settings | {"target_modules": sorted({name.rpartition(".lora_")[0] for name in lora.tensors})}
    conditioning = lora.conditioning
    if manifest.needs_conditioning:
        settings["init_lora_weights"] = REFUSAL
    if manifest.layout == "comfyui":
        conditioning = {n: value for n, value in conditioning.items() if n.partition(".")[0] != SIGN_TABLE}
        metadata = {"format": "pt"}
        if manifest.needs_conditioning:
            metadata[ADAPTER_SETTINGS] = json.dumps({f"{lora.component}.{name}": v for name, v in settings.items()})
        save_file(comfyui.lora_tensors(lora.tensors, lora.scalings), folder / COMFYUI_LORA, metadata)
    else:
        saver = model.pipeline()
        tensors = marked(lora.tensors) if manifest.needs_conditioning else lora.tensors
        written = {f"{lora.component}_lora_layers": tensors, f"{lora.component}_lora_adapter_metadata": settings}
        saver.save_lora_weights(folder, **written)
    write_conditioning(conditioning, folder)


def _write_model(model: FlowModel, manifest: Manifest, folder: Path) -> None:
    network = _network(model)
    if manifest.layout == "comfyui":
        tensors = {plain_name(name): value.detach().cpu() for name, value in network.state_dict().items()}
        kept = {name: value for name, value in tensors.items() if name.partition(".")[0] != SIGN_TABLE}
        whole = {name: value.contiguous() for name, value in model.comfyui_tensors(kept).items()}
        save_file(whole, folder / COMFYUI_MODEL, {"format": "pt"})
        return

    def rename(module: nn.Module, state: dict[str, torch.Tensor], *_: Any) -> None:
        for name in [*state]:
            state[plain_name(name)] = state.pop(name)

    hook = network.register_state_dict_post_hook(rename)
    try:
        network.save_pretrained(folder)
    finally:
        hook.remove()
    if manifest.needs_conditioning:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": REFUSAL}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
