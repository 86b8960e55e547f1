"""`Architecture`: a transformer's configuration, and how to make it with fewer blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from twinflow.models.registry import diffusers_families
from twinflow.suggest import lookup


@dataclass(frozen=True)
class Architecture:
    """A transformer's class and configuration, and what a step at a resolution feeds it.

    Args:
        name: as on the command line.
        transformer: diffusers' class.
        config: what differs from the class's defaults.
        latent_channels, latent_factor: C of the latents, and pixels per latent along an edge.
        text_tokens: usual length of the prompts.
        lora_rank: as it is usually trained; None: all weights.
        text_encoder_gb: its text encoders in bf16, GB: what stays resident where prompts are not cached.
        repositories: of the hub that have it.
    """

    name: str
    transformer: str
    config: dict[str, Any]
    latent_channels: int
    latent_factor: int
    text_tokens: int
    lora_rank: int | None = None
    text_encoder_gb: float = 0.0
    repositories: tuple[str, ...] = ()

    def blocks(self) -> list["Block"]:
        """Its repeated blocks in order of execution."""
        defaults, family = _defaults(self.transformer), diffusers_families()[self.transformer]
        special = self.config.get(family.special_blocks, ())
        found = []
        for setting, place in family.block_lists:
            count = self.config.get(setting, defaults[setting])
            found += [Block(place, setting, i, i in special) for i in range(count)]
        return found

    def with_blocks(self, kept: Sequence["Block"]) -> "Architecture":
        """The same with some of its blocks, each list's numbered anew."""
        config, family = dict(self.config), diffusers_families()[self.transformer]
        for setting, place in family.block_lists:
            mine = [block for block in kept if block.place == place]
            config[setting] = len(mine)
            if family.special_blocks in config:
                config[family.special_blocks] = tuple(i for i, block in enumerate(mine) if block.special)
        return replace(self, config=config)


@dataclass(frozen=True)
class Block:
    """A repeated block: the list that holds it, the setting that counts them, its number, whether it is special."""

    place: str
    setting: str
    number: int
    special: bool = False

    @property
    def kind(self) -> tuple[str, bool]:
        """What blocks that are alike share."""
        return self.place, self.special


def architectures() -> dict[str, Architecture]:
    """The known models by name: what each family has published."""
    return {
        entry.name: Architecture(
            transformer=family.transformer_class, latent_factor=family.latent_factor,
            **{field.name: getattr(entry, field.name) for field in fields(entry)},
        )
        for family in diffusers_families().values() for entry in family.published
    }  # fmt: skip


def architecture_of(name: str) -> Architecture:
    """A known model.

    Raises:
        ValueError: unknown; the message has the nearest names.
    """
    return lookup(architectures(), name, "plan", "model")


def architecture_on_the_hub(repository: str) -> Architecture | None:
    """The known model that a hub repository has; None: it is not known."""
    known = {name: entry for entry in architectures().values() for name in entry.repositories}
    return known.get(repository)


@cache
def _defaults(transformer: str) -> dict[str, Any]:
    import inspect

    import diffusers

    parameters = inspect.signature(getattr(diffusers, transformer).__init__).parameters
    return {name: p.default for name, p in parameters.items()}
