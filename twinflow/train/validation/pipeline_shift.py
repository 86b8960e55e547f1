"""`pipeline_shift()`: how a stock pipeline shifts its times towards noise."""

import json
import math
from pathlib import Path


def pipeline_shift(folder: Path, size: tuple[int, int], patch: int = 2) -> float:
    """The factor of docs/method.md, equation 34, that a pipeline's own scheduler applies; 1 where it shifts nothing.

    Schedulers that stretch their times to a last one (`shift_terminal`) shift by the same factor.

    Args:
        folder: the pipeline on disk.
        size: (H, W) of the latents.
        patch: latents along an edge of a token (`FlowModel.shift_patch`).

    Raises:
        ValueError: no settings of a scheduler there.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not config.get("use_dynamic_shifting"):
            return float(config.get("flow_shift", config.get("shift", 1.0)))
        first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = low + (high - low) * (size[0] * size[1] / patch**2 - first) / (last - first)
        return float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)
    except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"pipeline_shift: folder must have a scheduler's settings, got {path}: {error}") from None
