"""`MemoryPreset`: choices that decide how much memory a step takes, and `PRESETS`, the fastest first."""

from dataclasses import dataclass

from twinflow.suggest import lookup


@dataclass(frozen=True)
class MemoryPreset:
    """How a step is run.

    Args:
        name: as in `PRESETS`, or `auto` where the planner chose.
        saved: what each repeated block keeps for backward, one level of `twinflow.memory.SAVED` or one per block.
        micro_batch: most rows of a network call and of a graph; None: the whole batch at once.
        offload_gb: pinned host memory that saved activations may move to, GB; 0: none.
        defer: whether the frozen modulation weights (AdaLN) stay in pinned host memory.
        base: `int8` or `nf4`: what the frozen linear layers of the blocks are quantised to; None: as they are loaded.
        optimizer: the one that it counts on where the caller has plain AdamW, such as `adamw8bit`; None: any.
    """

    name: str
    saved: str | tuple[str, ...] = "all"
    micro_batch: int | None = 1
    offload_gb: float = 0.0
    defer: bool = False
    base: str | None = None
    optimizer: str | None = None

    def __str__(self) -> str:
        rows = "the whole batch at once" if self.micro_batch is None else f"{self.micro_batch} row(s) at a time"
        saved = self.saved if isinstance(self.saved, str) else runs(self.saved)
        moved = f", up to {self.offload_gb:g} GB of it in pinned host memory" if self.offload_gb else ""
        more = "".join(f"; {change}" for change in self.changes())
        return f"memory preset {self.name}: {rows}; blocks keep {saved}{moved}{more}"

    def changes(self) -> list[str]:
        """What it changes beside activations, in words."""
        return [
            *(["modulation weights in pinned host memory"] if self.defer else []),
            *([f"{self.base} base"] if self.base else []),
            *([f"counts on {self.optimizer}"] if self.optimizer else []),
        ]


def runs(levels: tuple[str, ...]) -> str:
    """Levels in order, equal neighbours counted: `20 x products, 40 x input`."""
    found: list[tuple[str, int]] = []
    for level in levels:
        if found and found[-1][0] == level:
            found[-1] = (level, found[-1][1] + 1)
        else:
            found.append((level, 1))
    return ", ".join(f"{count} x {level}" for level, count in found)


# Those with the weights as they are come first.
#   name                  saved        rows  offload GB  defer  base    optimizer
_TABLE = (
    ("batch",             "all",       None, 0.0,        False, None,   None),
    ("rows",              "all",       1,    0.0,        False, None,   None),
    ("80gb",              "products",  1,    0.0,        False, None,   None),
    ("attention",         "attention", 1,    0.0,        False, None,   None),
    ("checkpoint",        "input",     1,    0.0,        False, None,   None),
    ("checkpoint-offload", "input",    1,    8.0,        False, None,   None),
    ("40gb",              "input",     1,    0.0,        True,  None,   None),
    ("40gb-offload",      "input",     1,    8.0,        True,  None,   None),
    ("32gb",              "input",     1,    0.0,        True,  "int8", None),
    ("24gb",              "input",     1,    0.0,        True,  "nf4",  "adamw8bit"),
    ("16gb",              "input",     1,    8.0,        True,  "nf4",  "adamw8bit"),
)  # fmt: skip
PRESETS = {row[0]: MemoryPreset(*row) for row in _TABLE}


def preset_of(name: str) -> MemoryPreset:
    """A preset by its name.

    Raises:
        ValueError: unknown; the message has the nearest names.
    """
    return lookup(PRESETS, name, "apply_memory", "preset", also="auto or ")
