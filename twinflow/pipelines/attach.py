"""`attach()`: an export inside a stock diffusers pipeline."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from torch import nn

from twinflow.conditioning import (
    TimeConditioning,
    TimeEmbedder,
    conditioning_tensors,
    hook_owner,
    plain_copy,
    remove_hooks,
)
from twinflow.distributed import unwrap
from twinflow.errors import ArgumentError, require, require_type
from twinflow.formats.export_folder import without_refusal
from twinflow.formats.manifest import (
    LORA,
    REFUSAL,
    Manifest,
    put_conditioning,
    read_manifest,
    read_names,
    read_settings,
    read_tensors,
    saved_conditioning,
)
from twinflow.interface import check_tensors
from twinflow.lora import adapter_names, check_layers, lora_tensors
from twinflow.models import FlowModel, load
from twinflow.models.registry import diffusers_families, family_of_class
from twinflow.pipelines.embedded_guidance import EmbeddedGuidanceCheck
from twinflow.pipelines.time_hooks import AdapterStrength, SchedulerTimeHooks
from twinflow.scheduler import TwinFlowScheduler
from twinflow.teachers.adapter_slot import adapter_layers, enabled_adapters

Pipeline = TypeVar("Pipeline")
# Stands in the configuration that a conditioned transformer is saved with, and so in the error of loading it again.
_SAVED = "was saved with an export attached, without its conditioning: call twinflow.attach(pipe, folder) on the base"


def attach(
    pipe: Pipeline,
    lora_or_dir: str | Path,
    *,
    style: str = "few",
    adapter_name: str = "twinflow",
    **scheduler: Any,
) -> Pipeline:
    """Makes a stock pipeline draw with what `twinflow.export.export` saved, in a few steps.

    A LoRA is added to the pipeline's transformer, beside those that are active; a whole model replaces it, or
    its weights where the transformer is compiled or offloaded, which it stays. The pipeline
    gets a `TwinFlowScheduler`, which tells a conditioned transformer the exact times of each call. The conditioning is
    part of the LoRA: where diffusers switches that off, scales, fuses or unloads it, the second time embedding goes
    with it. `detach` gives the pipeline back.

    Args:
        pipe: a pipeline of the family that was trained, a modular one too, as it comes from `from_pretrained`.
        lora_or_dir: an exported folder, here or on the hub as owner/name, or a LoRA file.
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
    stock, transformer = _parts("attach", pipe)
    hooks = SchedulerTimeHooks.of(transformer)
    gone = hooks is not None and hooks.strength is not None and not hooks.strength.present
    require(hooks is None or gone, "attach", "pipe", "no export attached", "one", "call twinflow.detach(pipe)", "have")
    family = _family(transformer)
    walk = TwinFlowScheduler(style=style, **{"stock_sigmas": family.stock_sigmas, **scheduler})
    saved = _read(_local(lora_or_dir), style, family.conditioning_roots())
    theirs = family.family if saved.manifest is None else saved.manifest.family
    require(theirs == family.family, "attach", "pipe", f"of family {theirs}", family.family)
    if hooks is not None:  # of a LoRA that has been unloaded since
        _take_off(stock, transformer, hooks)
    model, strength = family(transformer), None
    if saved.lora is None:
        model = _replaced(stock, model, _whole_model(saved.folder, model))
    else:
        strength = _add_lora(pipe, model, saved, adapter_name)
    del transformer  # freed where a whole model has taken its place
    hooks = SchedulerTimeHooks(stock, model, strength)
    hooks.before = {"scheduler": stock.scheduler, "config": model.network._internal_dict}
    _register(stock, scheduler=walk)
    hooks.register(model.network)
    EmbeddedGuidanceCheck(stock, model)
    mode = "" if model.conditioning is None else model.conditioning.mode
    if "dual" in mode or ("midpoint" in mode and style != "few"):
        model.network.register_to_config(quantization_config={"quant_method": _SAVED})  # type: ignore[operator]
    return pipe


def detach(pipe: Pipeline) -> Pipeline:
    """Takes off what `attach` added: the LoRA, its conditioning and the scheduler; the pipeline draws as before.

    Args:
        pipe: the pipeline that was given to `attach`.

    Returns:
        The pipeline, with the scheduler that it had.

    Raises:
        TypeError: `pipe` is no pipeline with a transformer.
        ValueError: nothing is attached, a whole model is, or the LoRA is fused into the weights.
    """
    stock, transformer = _parts("detach", pipe)
    hooks = SchedulerTimeHooks.of(transformer)
    if hooks is None:
        raise ArgumentError("detach", "pipe", "an export attached", "none", verb="have")
    if hooks.strength is None:
        raise ArgumentError("detach", "pipe", "a LoRA attached", "a whole model", "load the pipeline anew", "have")
    fused = any(hooks.strength.adapter in layer.merged_adapters for layer in adapter_layers(transformer).values())
    adapter, hint = hooks.strength.adapter, "call pipe.unfuse_lora() first, or load the pipeline anew"
    alone = not fused and not hooks.strength.fused
    require(alone, "detach", f"LoRA {adapter!r}", "apart from the weights", "fused into them", hint)
    _take_off(stock, transformer, hooks)
    if isinstance(stock.scheduler, TwinFlowScheduler):
        _register(stock, scheduler=hooks.before["scheduler"])
    return pipe


def _parts(function: str, pipe: Any) -> tuple[Any, Any]:
    """A pipeline, checked, and its transformer without wrappers."""
    known = isinstance(pipe, (DiffusionPipeline, ModularPipeline))
    complete = known and isinstance(getattr(pipe, "transformer", None), nn.Module)
    require_type(complete, function, "pipe", "a diffusers pipeline with a transformer", type(pipe).__name__)
    return pipe, unwrap(pipe.transformer)


def _register(pipe: Any, **components: Any) -> None:
    """Puts components into a pipeline."""
    modular = isinstance(pipe, ModularPipeline)
    (pipe.update_components if modular else pipe.register_modules)(**components)


def _take_off(pipe: Any, transformer: Any, hooks: SchedulerTimeHooks) -> None:
    """Hooks, conditioning, and the LoRA where it is still there."""
    assert hooks.strength is not None
    hooks.remove(transformer)
    check = hook_owner(transformer, EmbeddedGuidanceCheck)
    if check is not None:
        remove_hooks(transformer, check)
    transformer._internal_dict = hooks.before["config"]
    if hooks.strength.adapter in adapter_names(transformer):
        transformer.delete_adapters(hooks.strength.adapter)
        if not adapter_names(transformer):
            transformer.unload_lora()


@dataclass(frozen=True)
class _Saved:
    """What was read: the LoRA (None: a whole model), its configuration, and the conditioning's tensors."""

    folder: Path
    manifest: Manifest | None
    lora: dict[str, torch.Tensor] | None = None
    settings: dict[str, Any] | None = None
    conditioning: dict[str, torch.Tensor] | None = None


def _local(lora_or_dir: str | Path) -> Path:
    """The path of an export, which is downloaded where it is a name on the hub."""
    path, name = Path(lora_or_dir).expanduser(), str(lora_or_dir)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return path
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of the network, the hub, or its access rules
        wanted, brief = "a folder, a file, or a name on the hub", " ".join(str(error).split())[:200]
        raise ArgumentError("attach", "lora_or_dir", wanted, f"{name!r}: {brief}") from error


def _read(path: Path, style: str, roots: tuple[str, ...]) -> _Saved:
    require(path.exists(), "attach", "lora_or_dir", "a folder or a file", f"{path}, which does not exist")
    folder, file = (path, path / LORA) if path.is_dir() else (path.parent, path)
    manifest = read_manifest(folder)
    if manifest is not None and manifest.layout != "diffusers":
        raise ArgumentError("attach", "lora_or_dir", "an export of format 'diffusers'", repr(manifest.layout))
    if path.is_dir() and (not file.exists() if manifest is None else manifest.kind == "full"):
        described = (path / "config.json").exists()
        require(described, "attach", "lora_or_dir", f"{LORA} or a model's config.json", path, verb="hold")
        return _Saved(folder, manifest)
    if file.name != LORA:
        manifest = None  # what another file of the folder is
    lora = read_tensors(file)
    settings = read_settings(file)
    alone = style == "few" and REFUSAL not in (settings or {}).values()
    got = f"{file} without a twinflow.json beside it"
    require(manifest is not None or alone, "attach", "lora_or_dir", "the whole exported folder", got)
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
        raise ArgumentError("attach", f"{folder}", "a whole model", error, verb="hold") from error
    finally:
        logging.set_verbosity(level)
    missing = sorted(model.network.state_dict().keys() - names)
    got = f"none named {', '.join(missing[:1])}"
    require(not missing, "attach", f"{folder}", "every weight of its model", got, verb="hold")
    for what, mine, theirs in (
        ("family", model.family, replaced.family),
        ("latent channels", model.latent_channels(), replaced.latent_channels()),
        ("prompt widths", model.condition_widths(), replaced.condition_widths()),
    ):
        require(mine == theirs, "attach", "pipe", f"of {what} {mine}", theirs)
    model.network.eval()
    return model


def _replaced(pipe: Any, model: FlowModel, loaded: FlowModel) -> FlowModel:
    """The model that draws from now on: the loaded one, or the one that is there with its weights."""
    if _is_placed(pipe.transformer, model.network):
        _pour(pipe, model, loaded)
        return model
    device = next(model.network.parameters()).device
    _register(pipe, transformer=loaded.network)
    loaded.network.to(device)
    return loaded


def _is_placed(called: nn.Module, transformer: Any) -> bool:
    """Whether a pipeline's transformer is compiled, offloaded, or cast by hooks, none of which a successor has."""
    hooked = any(hasattr(module, name) for module in transformer.modules() for name in ("_hf_hook", "_diffusers_hook"))
    return called is not transformer or transformer._compiled_call_impl is not None or hooked


def _pour(pipe: Any, model: FlowModel, loaded: FlowModel) -> None:
    """Puts a whole model's weights into the transformer that is there, which stays compiled and offloaded as it is."""
    network: Any = model.network
    hint = "attach to a pipeline as it comes from from_pretrained, and compile or offload it afterwards"
    values = loaded.network.state_dict()
    added = conditioning_tensors(loaded.network).keys()
    here = {name: tensor.shape for name, tensor in network.state_dict().items()}
    same = here == {name: tensor.shape for name, tensor in values.items() if name not in added}
    kept = all(p.is_floating_point() and p.dtype.itemsize > 1 for p in network.parameters())
    mapped = getattr(pipe, "hf_device_map", None) is not None
    got = "one that is compiled, offloaded or cast"
    require(
        same and kept and not mapped, "attach", "pipe", "a stock transformer for this whole model", got, hint, "have"
    )
    by_model, in_sequence, in_groups = network._optionally_disable_offloading(pipe)
    if loaded.conditioning is not None:
        model.condition(loaded.conditioning.mode)
        model.conditioning.requires_grad_(False)  # type: ignore[union-attr]
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(values[name])
    network.eval()
    if by_model:
        pipe.enable_model_cpu_offload()
    elif in_sequence:
        pipe.enable_sequential_cpu_offload()
    elif in_groups:
        _maybe_remove_and_reapply_group_offloading(network)


def _add_lora(pipe: Any, model: FlowModel, saved: _Saved, adapter: str) -> AdapterStrength:
    network: Any = model.network
    assert saved.lora is not None and saved.conditioning is not None
    require(adapter not in adapter_names(network), "attach", "adapter_name", "a name that is not taken", repr(adapter))
    check_layers("attach", "lora_or_dir", model, saved.lora)
    mode = None if saved.manifest is None else saved.manifest.conditioning
    if mode is not None:
        check_tensors("attach", "conditioning", _expected_conditioning(model, mode), saved.conditioning)
    settings = saved.settings
    if settings is not None:
        settings = settings | {f"{model.component}.init_lora_weights": True}
    active = dict.fromkeys(name for layer in adapter_layers(network).values() for name in enabled_adapters(layer))
    if mode is not None:  # before the LoRA is loaded: diffusers then places the new layers as the pipeline is placed
        model.condition(mode)
        put_conditioning(network, saved.conditioning, "attach")
    try:
        network.load_lora_adapter(
            saved.lora, prefix=model.component, adapter_name=adapter, metadata=settings, _pipeline=pipe
        )
    except Exception as error:
        if model.conditioning is not None:
            model.conditioning.remove(network)
        brief = " ".join(str(error).split())[:300]  # peft names every layer
        raise ArgumentError("attach", f"{saved.folder}", "a LoRA that peft takes", brief, verb="hold") from error
    for layer in adapter_layers(network).values():
        layer.__dict__.update(_active_adapter=[*(active | {adapter: None})], _disable_adapters=False)
    for name, weight in lora_tensors(network, adapter).items():
        if weight.dtype.itemsize == 1:  # as the base is stored under layerwise casting, which leaves adapters out
            weight.data = saved.lora[f"{model.component}.{name}"].to(weight.device, torch.float32)
    layers: dict[str, Any] = {**adapter_layers(network)}
    path = next(name for name, layer in layers.items() if adapter in layer.scaling)
    return AdapterStrength(network, path, adapter)


def _expected_conditioning(model: FlowModel, mode: str) -> dict[str, torch.Tensor]:
    """Names and tensors that a mode adds to the transformer, which is left as it is."""
    embedder: TimeEmbedder = model.time_embedder()
    first = model.network.get_submodule(embedder.path)
    stock = hook_owner(first, TimeConditioning) is None
    require(stock, "attach", "pipe", "a stock transformer", "one that is conditioned already", verb="have")
    skeleton = nn.Module()
    parent, (*path, last) = skeleton, embedder.path.split(".")
    for name in path:
        parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(last, plain_copy(first))
    TimeConditioning(skeleton, embedder, mode)
    return conditioning_tensors(skeleton)
