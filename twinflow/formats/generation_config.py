"""`GenerationConfig`: default generation settings stored with an export: base pipeline, steps, size, guidance."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_MOST_PIXELS = 16384  # of an edge
_MOST_STEPS = 1000


@dataclass(frozen=True)
class GenerationConfig:
    """How an export is drawn with.

    Args:
        model: the pipeline underneath, its folder or its name on the hub.
        steps: of the sampler.
        size: width and height, pixels; None: the pipeline's own.
        guidance: scale; up to 1: none.

    Raises:
        ValueError: a value that no pipeline takes.
    """

    model: str
    steps: int
    size: tuple[int, int] | None = None
    guidance: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.strip() or "\0" in self.model:
            raise ValueError(f"Usage: model must be a pipeline's folder or hub name, got {self.model!r}")
        if type(self.steps) is not int or not 1 <= self.steps <= _MOST_STEPS:
            raise ValueError(f"Usage: steps must be an integer from 1 to {_MOST_STEPS}, got {self.steps!r}")
        if self.size is not None and not _is_size(self.size):
            raise ValueError(f"Usage: size must be width and height of 1 to {_MOST_PIXELS} pixels, got {self.size!r}")
        number = isinstance(self.guidance, (int, float)) and not isinstance(self.guidance, bool)
        if not number or not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"Usage: guidance must be a number >= 0, got {self.guidance!r}")

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds; a model that is a folder here becomes an absolute path."""
        path = Path(self.model).expanduser()
        return asdict(self) | {"model": str(path.absolute()) if path.is_dir() else self.model}

    @classmethod
    def from_dict(cls, saved: Any) -> "GenerationConfig":
        """Reads what `to_dict` gives; later additions are passed over.

        Raises:
            ValueError: something else.
        """
        if not isinstance(saved, Mapping) or not {"model", "steps"} <= saved.keys():
            raise ValueError(f"Usage: saved must have model and steps, got {str(saved)[:80]}")
        size = saved.get("size")
        return cls(
            model=saved["model"],
            steps=saved["steps"],
            size=tuple(size) if isinstance(size, list) else size,
            guidance=saved.get("guidance", 0.0),
        )


def _is_size(size: Any) -> bool:
    edges = isinstance(size, tuple) and len(size) == 2
    return edges and all(type(edge) is int and 1 <= edge <= _MOST_PIXELS for edge in size)
