"""`Workload`: a training step that a forecast is asked for."""

from dataclasses import dataclass, replace
from typing import Any

from twinflow.conditioning import LORA_MODE, MODES
from twinflow.errors import require
from twinflow.memory.planner.architectures import Architecture, architecture_of
from twinflow.memory.presets import MemoryPreset
from twinflow.objective.config import RECIPES, TwinFlowConfig

BASES = ("bfloat16", "float32", "int8", "nf4")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, and on how much at once.

    Args:
        architecture: the model.
        resolution: edge of the images, pixels, or (height, width).
        batch: logical batch: rows of an optimizer step on this card.
        lora_rank: rank of the LoRA on a frozen base; None: all weights are trained.
        lora_targets: layers of the LoRA; None: the family's.
        conditioning: one of `twinflow.conditioning.MODES`.
        recipe: one of `twinflow.objective.config.RECIPES`.
        order: teacher steps N of the rollout.
        text_tokens: length of the prompts; None: as usual for the model.
        base: dtype of the weights: `bfloat16`, or `float32` with autocast to bf16; of a frozen base also `int8`, `nf4`.
        optimizer: `adamw`, `adamw8bit` or `sgd` (without momentum).
        deferrable: whether the modulation may be deferred where the architecture has it: not if it is packed, for one.

    Raises:
        ValueError: a value out of its range, or a quantised base that is to be trained.
    """

    architecture: Architecture
    resolution: int | tuple[int, int] = 1024
    batch: int = 4
    lora_rank: int | None = 64
    lora_targets: tuple[str, ...] | None = None
    conditioning: str = LORA_MODE
    recipe: str = "partition"
    order: int = 2
    text_tokens: int | None = None
    base: str = "bfloat16"
    optimizer: str = "adamw"
    deferrable: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("conditioning", self.conditioning, MODES), ("recipe", self.recipe, RECIPES), ("base", self.base, BASES),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):  # fmt: skip
            require(value in known, "plan", name, f"one of {', '.join(known)}", repr(value))
        for name, least in (("batch", 1), ("order", 0), ("lora_rank", 1), ("text_tokens", 1)):
            value = getattr(self, name)
            fits = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
            require(fits, "plan", name, f"an integer >= {least}", repr(value))
        trainable = self.base not in ("int8", "nf4") or self.lora_rank is not None
        require(trainable, "plan", "base", "bfloat16 or float32 where all weights are trained", repr(self.base))
        multiple = self.architecture.latent_factor * 2
        whole = all(edge >= multiple and edge % multiple == 0 for edge in self.size)
        require(whole, "plan", "resolution", f"a multiple of {multiple} pixels", self.resolution)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        given = self.resolution
        return (given, given) if isinstance(given, int) else (given[0], given[1])

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        a = self.architecture
        return a.latent_channels, self.size[0] // a.latent_factor, self.size[1] // a.latent_factor

    @property
    def tokens(self) -> int:
        """Length of the prompts."""
        return self.text_tokens or self.architecture.text_tokens

    @property
    def config(self) -> TwinFlowConfig:
        """The objective's settings."""
        return TwinFlowConfig(recipe=self.recipe, estimate_order=self.order)

    @property
    def trains(self) -> str:
        """What is trained, in words."""
        return "all weights" if self.lora_rank is None else f"LoRA r={self.lora_rank}"

    def under(self, preset: MemoryPreset) -> "Workload":
        """The same with a preset's base, and its optimizer in plain AdamW's place."""
        optimizer = preset.optimizer if self.optimizer == "adamw" else None
        return self.but(base=preset.base or self.base, optimizer=optimizer or self.optimizer)

    def but(self, **changes: Any) -> "Workload":
        """The same with some values changed."""
        return replace(self, **changes)


def workload_of(model: str, **settings: Any) -> Workload:
    """The workload of a known model; `lora_rank` left out is what is usual for it, and full training is in float32.

    Raises:
        ValueError: an unknown model, or as `Workload`.
    """
    architecture = architecture_of(model)
    settings.setdefault("lora_rank", architecture.lora_rank)
    settings.setdefault("base", "float32" if settings["lora_rank"] is None else "bfloat16")
    return Workload(architecture=architecture, **settings)
