"""`FAMILIES`: the model families by name. Nothing heavy is imported before a family is asked for."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinflow.models.base import FlowModel


@dataclass(frozen=True)
class Registration:
    """Where a family is, and what the command line knows of it before torch is imported.

    Args:
        model: "module:class", or the class itself.
        aliases: other spellings of its name in configs.
        diffusion: whether it predicts epsilon or v, which a bridge reads as a velocity, and not a velocity itself.
        trains: whether `twinflow train` takes it.
    """

    model: "str | type[FlowModel]"
    aliases: tuple[str, ...] = ()
    diffusion: bool = False
    trains: bool = True


# One line a family; all else that is known of it stands in its file.
REGISTRATIONS: dict[str, Registration] = {
    "qwen_image": Registration("twinflow.models.qwen_image:QwenImageModel", ("qwen-image",)),
    "sd3": Registration("twinflow.models.sd3:SD3Model"),
    "sana": Registration("twinflow.models.sana:SanaModel"),
    "flux": Registration("twinflow.models.flux:FluxModel"),
    "z_image": Registration("twinflow.models.z_image:ZImageModel", ("z-image", "z_image_turbo", "z-image-turbo")),
    "unet": Registration("twinflow.models.unet:UNetModel", ("sd1x", "sd2x", "sdxl"), diffusion=True),
    "generic": Registration("twinflow.models.generic:GenericModel", trains=False),
}


class _Families(Mapping[str, "type[FlowModel]"]):
    """Name -> class, imported when it is asked for."""

    def __getitem__(self, name: str) -> "type[FlowModel]":
        model: Any = REGISTRATIONS[name].model
        if isinstance(model, str):
            module, _, attribute = model.partition(":")
            model = getattr(import_module(module), attribute)
        return model

    def __iter__(self) -> Iterator[str]:
        return iter(REGISTRATIONS)

    def __len__(self) -> int:
        return len(REGISTRATIONS)


FAMILIES: Mapping[str, "type[FlowModel]"] = _Families()


def register(model: "type[FlowModel]", *, aliases: tuple[str, ...] = (), diffusion: bool = False) -> None:
    """Makes a family of your own known to `load`, `attach`, `export`, the planner and the trainer.

    Args:
        model: subclass of `FlowModel`.
        aliases, diffusion: as in `Registration`.

    Raises:
        ValueError: the name is taken by another class.
    """
    from twinflow.errors import ArgumentError

    if model.family in REGISTRATIONS and FAMILIES[model.family] is not model:
        raise ArgumentError("register", "family", "a name that is not taken", repr(model.family))
    REGISTRATIONS[model.family] = Registration(model, aliases, diffusion)


def diffusers_families() -> dict[str, "type[FlowModel]"]:
    """diffusers' class of the transformer or UNet -> family."""
    return {model.transformer_class: model for model in FAMILIES.values() if hasattr(model, "transformer_class")}


def family_of_class(names: Iterable[str]) -> "type[FlowModel] | None":
    """The family of the first known class among some names, such as those of a method resolution order."""
    classes = diffusers_families()
    return next((classes[name] for name in names if name in classes), None)
