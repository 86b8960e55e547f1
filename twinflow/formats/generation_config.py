"""`GenerationConfig`: default generation settings stored with an export: base pipeline, steps, size, guidance."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twinflow.errors import require
from twinflow.sampling.grid import is_number

_NAME = "GenerationConfig"
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
        model, steps, size, guidance = self.model, self.steps, self.size, self.guidance
        named = isinstance(model, str) and model.strip() and "\0" not in model
        require(named, _NAME, "model", "a pipeline's folder or hub name", repr(model))
        counted = type(steps) is int and 1 <= steps <= _MOST_STEPS
        require(counted, _NAME, "steps", f"an integer from 1 to {_MOST_STEPS}", repr(steps))
        wanted = f"width and height of 1 to {_MOST_PIXELS} pixels"
        require(size is None or _is_size(size), _NAME, "size", wanted, repr(size))
        require(is_number(guidance) and guidance >= 0, _NAME, "guidance", "a number >= 0", repr(guidance))

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
        complete = isinstance(saved, Mapping) and {"model", "steps"} <= saved.keys()
        require(complete, _NAME, "usage", "model and steps", str(saved)[:80], verb="have")
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
