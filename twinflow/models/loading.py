"""`load()`: a diffusers model as a student, from a module, a folder or a hub name."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from twinflow.conditioning import SIGN_TABLE
from twinflow.errors import ArgumentError, require
from twinflow.formats.export_folder import without_refusal
from twinflow.formats.manifest import inferred_mode, put_conditioning, read_manifest, saved_conditioning
from twinflow.formats.variants import variant_of, variant_on_the_hub
from twinflow.models.base import FlowModel, without_peft
from twinflow.models.registry import FAMILIES, diffusers_families, family_of_class

_SUBFOLDERS = ("transformer", "unet")


def load(
    name_or_path_or_module: str | Path | nn.Module | Callable[..., Any],
    *,
    family: str | None = None,
    conditioning: str | None = None,
    cfg_time: str = "published",
    torch_dtype: Any = None,
    **options: Any,
) -> FlowModel:
    """Makes a student F(x_t, t, r, cond) of a diffusers model.

    Args:
        name_or_path_or_module: a diffusers transformer or UNet (in peft's wrapper or not), any other callable with
            `family="generic"`, or where to load one from: a pipeline's or a model's folder, or a name on the hub.
        family: one of `FAMILIES`; None: by the model's class.
        conditioning: how the model is told the target time and the sign, one of `twinflow.conditioning.MODES`; None:
            plain flow matching, or the conditioning of a saved model that has one.
        cfg_time: time that guidance queries tell a `midpoint` model: `published` t/2, or `t`.
        torch_dtype: for loading; None: diffusers' default.
        options: of the family (`UNetModel`: scheduler and opt-ins; `generic`: time scale and direction).

    Returns:
        The student; its module is `.transformer`, unmodified.

    Raises:
        ValueError: an unknown family or class, an unsupported mode, another mode than a saved model's, or a bad file.
    """
    given = name_or_path_or_module
    known = family is None or family in FAMILIES
    require(known, "load", "family", f"one of {', '.join(FAMILIES)}", repr(family))
    folder = None
    module: Any = given
    if isinstance(given, (str, Path)):
        module, folder = _from_pretrained(given, torch_dtype)
    model = FAMILIES[family] if family is not None else _family_of(module)
    saved = {} if folder is None else saved_conditioning(folder, model.conditioning_roots())
    if folder is not None:
        conditioning = _saved_mode(folder, saved, conditioning)
    student = model(module, conditioning=conditioning, cfg_time=cfg_time, **options)
    if saved:
        put_conditioning(student.network, saved, "load")
    return student


def _family_of(module: Any) -> type[FlowModel]:
    network = without_peft(module)
    model = family_of_class(cls.__name__ for cls in type(network).__mro__)
    if model is None:
        classes = ", ".join(diffusers_families())
        hint = f"known classes are {classes}, and family='generic' takes any network(x, time, cond)"
        raise ArgumentError("load", "family", f"given for a {type(network).__name__}", None, hint)
    return model


def _saved_mode(folder: Path, saved: dict[str, Any], asked: str | None) -> str | None:
    """The conditioning of a model folder: what it was saved with, which no other may replace."""
    manifest = read_manifest(folder)
    if manifest is not None:
        mode = manifest.conditioning
    else:
        table_alone = all(name.partition(".")[0] == SIGN_TABLE for name in saved) and bool(saved)
        mode = asked if table_alone and asked in ("sign", "midpoint+sign") else inferred_mode(saved, folder)
    wanted = f"{mode!r}, with which {folder} was trained"
    require(mode is None or asked in (None, mode), "load", "conditioning", wanted, repr(asked))
    return mode or asked


def _from_pretrained(name: str | Path, torch_dtype: Any) -> tuple[nn.Module, Path | None]:
    """The module, and its local folder where there is one."""
    import diffusers

    path = Path(name)
    if path.is_dir():
        folder = next((path / sub for sub in _SUBFOLDERS if (path / sub / "config.json").exists()), path)
        described, got = (folder / "config.json").exists(), f"{path} without config.json"
        require(described, "load", "name_or_path", "a model or a pipeline", got, verb="hold")
        where: tuple[str, dict[str, str]] = (str(folder), {})
    else:
        folder = None
        where = (str(name), _subfolder_on_the_hub(str(name)))
    config: Any = diffusers.AutoModel.load_config(where[0], **where[1])
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    cls = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        wanted = f"a model of diffusers {diffusers.__version__}"
        raise ArgumentError("load", "name_or_path", wanted, class_name, verb="hold")
    # An export of a dual mode tells stock loaders that it needs its second embedder, which follows here.
    with nullcontext(where[0]) if folder is None else without_refusal(folder) as place:
        variant = None if folder is None else variant_of(folder)
        try:
            return cls.from_pretrained(place, torch_dtype=torch_dtype, variant=variant, **where[1]), folder
        except OSError:
            variant = variant_on_the_hub(str(name), where[1].get("subfolder", "")) if folder is None else None
            if variant is None:
                raise
        return cls.from_pretrained(place, torch_dtype=torch_dtype, variant=variant, **where[1]), folder


def _subfolder_on_the_hub(name: str) -> dict[str, str]:
    """Where a hub repository keeps its transformer or UNet: in a pipeline's subfolder, or at its root."""
    from diffusers import DiffusionPipeline

    try:
        index: Any = DiffusionPipeline.load_config(name)
    except OSError:
        return {}
    return {"subfolder": next((sub for sub in _SUBFOLDERS if sub in index), _SUBFOLDERS[0])}
