"""`attach()`: an export inside a stock diffusers pipeline."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import nn

from twinflow.conditioning import TimeConditioning, TimeEmbedder, conditioning_tensors
from twinflow.distributed import unwrap
from twinflow.errors import ArgumentError
from twinflow.formats.export_folder import without_refusal
from twinflow.formats.manifest import (
    LORA,
    REFUSAL,
    Manifest,
    check_conditioning,
    put_conditioning,
    read_manifest,
    read_names,
    read_settings,
    read_tensors,
    saved_conditioning,
)
from twinflow.models import FlowModel, load
from twinflow.models.registry import diffusers_families, family_of_class
from twinflow.pipelines.time_hooks import SchedulerTimeHooks
from twinflow.scheduler import TwinFlowScheduler
from twinflow.teachers.adapter_slot import adapter_layers

# Of a LoRA's two weights: the axis along its layer, and the layer's width there.
_WIDTHS = {
    "A.weight": (1, ("in_features", "in_channels")),
    "B.weight": (0, ("out_features", "out_channels")),
}


def attach(
    pipe: DiffusionPipeline,
    lora_or_dir: str | Path,
    *,
    style: str = "few",
    adapter_name: str = "twinflow",
    **scheduler: Any,
) -> DiffusionPipeline:
    """Makes a stock pipeline draw with what `twinflow.export.export` saved, in a few steps.

    A LoRA is added to the pipeline's transformer, beside those that are active; a whole model replaces it. The pipeline
    gets a `TwinFlowScheduler`, which tells a conditioned transformer the exact times of each call.

    Args:
        pipe: a pipeline of the family that was trained, as it comes from `from_pretrained`.
        lora_or_dir: an exported folder, or a LoRA file.
        style: target time of each call: `few` r = 0, `any` r = the next time, `mul` r = t.
        adapter_name: the LoRA's name in the pipeline.
        scheduler: further options of `TwinFlowScheduler`.

    Returns:
        The pipeline.

    Raises:
        TypeError: `pipe` is no pipeline with a transformer.
        ValueError: weights of another family or model, a pipeline that has an export attached, a name that is taken, a
            damaged file, or a LoRA file without the folder that it needs. The pipeline then draws as before.
    """
    if not isinstance(pipe, DiffusionPipeline) or not isinstance(getattr(pipe, "transformer", None), nn.Module):
        raise TypeError(f"attach: pipe must be a diffusers pipeline with a transformer, got {type(pipe).__name__}")
    stock: Any = pipe
    transformer: Any = unwrap(stock.transformer)
    if SchedulerTimeHooks.of(transformer) is not None:
        raise ValueError("attach: pipe must have no export attached, got one that has; load it anew")
    walk = TwinFlowScheduler(style=style, **scheduler)
    family = _family(transformer)
    saved = _read(Path(lora_or_dir), style, family.conditioning_roots())
    if saved.manifest is not None and saved.manifest.family != family.family:
        raise ValueError(f"attach: pipe must be of family {saved.manifest.family}, got {family.family}")
    model = family(transformer)
    if saved.lora is None:
        device = next(transformer.parameters()).device
        model = _whole_model(saved.folder, model)
        stock.register_modules(transformer=model.network)
        del transformer  # freed before its successor needs the room
        model.network.to(device)
    else:
        _add_lora(pipe, model, saved, adapter_name)
    stock.register_modules(scheduler=walk)
    SchedulerTimeHooks(pipe, model).register(model.network)
    return pipe


@dataclass(frozen=True)
class _Saved:
    """What was read: the LoRA (None: a whole model), its configuration, and the conditioning's tensors."""

    folder: Path
    manifest: Manifest | None
    lora: dict[str, torch.Tensor] | None = None
    settings: dict[str, Any] | None = None
    conditioning: dict[str, torch.Tensor] | None = None


def _read(path: Path, style: str, roots: tuple[str, ...]) -> _Saved:
    if not path.exists():
        raise ValueError(f"attach: lora_or_dir must be a folder or a file, got {path}, which does not exist")
    folder, file = (path, path / LORA) if path.is_dir() else (path.parent, path)
    manifest = read_manifest(folder)
    if manifest is not None and manifest.layout != "diffusers":
        raise ValueError(f"attach: lora_or_dir must be an export of format 'diffusers', got {manifest.layout!r}")
    if path.is_dir() and (not file.exists() if manifest is None else manifest.kind == "full"):
        if not (path / "config.json").exists():
            raise ValueError(f"attach: lora_or_dir must hold {LORA} or a model's config.json, got {path}")
        return _Saved(folder, manifest)
    if file.name != LORA:
        manifest = None  # what another file of the folder is
    lora = read_tensors(file)
    settings = read_settings(file)
    if manifest is None and (style != "few" or REFUSAL in (settings or {}).values()):
        raise ValueError(
            f"attach: lora_or_dir must be the whole exported folder, got {file} without a twinflow.json beside it"
        )
    beside = manifest is not None and manifest.conditioning not in (None, "midpoint")
    return _Saved(folder, manifest, lora, settings, saved_conditioning(folder, roots) if beside else {})


def _family(transformer: nn.Module) -> type[FlowModel]:
    model = family_of_class(cls.__name__ for cls in type(transformer).__mro__)
    if model is None or model.component != "transformer":
        known = ", ".join(m.family for m in diffusers_families().values() if m.component == "transformer")
        raise ArgumentError("attach", "pipe", f"of one of {known}", f"one with a {type(transformer).__name__}")
    return model


def _whole_model(folder: Path, replaced: FlowModel) -> FlowModel:
    """The model of a folder, on the CPU."""
    names = {name for file in folder.glob("*.safetensors") for name in read_names(file)}
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # diffusers warns of the second embedder, which is loaded right after
    try:
        with without_refusal(folder) as plain:
            model = load(plain, torch_dtype=replaced.dtype)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"attach: {folder} must hold a whole model, got {error}") from error
    finally:
        logging.set_verbosity(level)
    missing = sorted(model.network.state_dict().keys() - names)
    if missing:
        raise ValueError(f"attach: {folder} must hold every weight of its model, got none named {missing[0]}")
    for what, mine, theirs in (
        ("family", model.family, replaced.family),
        ("latent channels", model.latent_channels(), replaced.latent_channels()),
        ("prompt widths", model.condition_widths(), replaced.condition_widths()),
    ):
        if mine != theirs:
            raise ValueError(f"attach: pipe must be of {what} {mine}, got {theirs}")
    model.network.eval()
    return model


def _add_lora(pipe: DiffusionPipeline, model: FlowModel, saved: _Saved, adapter: str) -> None:
    network: Any = model.network
    assert saved.lora is not None and saved.conditioning is not None
    if adapter in (getattr(network, "peft_config", None) or {}):
        raise ValueError(f"attach: adapter_name must be a name that is not taken, got {adapter!r}")
    _check_lora(network, saved.lora, f"{model.component}.")
    mode = None if saved.manifest is None else saved.manifest.conditioning
    if mode is not None:
        check_conditioning(_expected_conditioning(model, mode), saved.conditioning, "attach")
    settings = saved.settings
    if settings is not None:
        settings = settings | {f"{model.component}.init_lora_weights": True}
    active = dict.fromkeys(name for layer in adapter_layers(network).values() for name in layer.active_adapters)
    try:
        network.load_lora_adapter(
            saved.lora, prefix=model.component, adapter_name=adapter, metadata=settings, _pipeline=pipe
        )
    except Exception as error:
        brief = " ".join(str(error).split())[:300]  # peft names every layer
        raise ValueError(f"attach: {saved.folder} must hold a LoRA that peft takes, got {brief}") from error
    for layer in adapter_layers(network).values():
        layer._active_adapter = [*(active | {adapter: None})]
    if mode is not None:
        model.condition(mode)
        put_conditioning(network, saved.conditioning, "attach")


def _check_lora(network: nn.Module, lora: dict[str, torch.Tensor], prefix: str) -> None:
    """Raises ValueError unless every weight belongs to a layer of the network and has its width."""
    if not lora:
        raise ValueError("attach: lora_or_dir must hold LoRA weights, got an empty file")
    layers: dict[str, Any] = dict(network.named_modules())
    for name, value in lora.items():
        layer, found, place = name.removeprefix(prefix).rpartition(".lora_")
        module = layers.get(layer)
        if not name.startswith(prefix) or not found or module is None:
            raise ValueError(f"attach: pipe must have the layers of the LoRA, got one without {layer or name}")
        if place not in _WIDTHS:
            continue
        axis, names = _WIDTHS[place]
        width = next((getattr(module, n) for n in names if hasattr(module, n)), None)
        if value.dim() < 2 or value.shape[axis] != width:
            raise ValueError(f"attach: {name} must be of width {width} as its layer, got {tuple(value.shape)}")


def _expected_conditioning(model: FlowModel, mode: str) -> dict[str, torch.Tensor]:
    """Names and tensors that a mode adds to the transformer, which is left as it is."""
    embedder: TimeEmbedder = model.time_embedder()
    first = model.network.get_submodule(embedder.path)
    owners = [getattr(hook, "__self__", None) for hook in first._forward_pre_hooks.values()]
    if any(isinstance(owner, TimeConditioning) for owner in owners):
        raise ValueError("attach: pipe must have a stock transformer, got one that is conditioned already")
    skeleton = nn.Module()
    parent, (*path, last) = skeleton, embedder.path.split(".")
    for name in path:
        parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(last, copy.deepcopy(first))
    TimeConditioning(skeleton, embedder, mode)
    return conditioning_tensors(skeleton)
