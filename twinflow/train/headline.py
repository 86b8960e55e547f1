"""`headline()`: what is about to be trained, in a line."""

from twinflow.distributed import world
from twinflow.train.config.settings import TrainSettings
from twinflow.train.setup import Assembled


def headline(settings: TrainSettings, parts: Assembled, entries: int) -> str:
    """Model, what of it is trained, on what, how, and where.

    Args:
        settings: of the run.
        parts: of the run.
        entries: images or prompts that it is trained on.
    """
    kind = f"LoRA of rank {settings.lora_rank}" if settings.model_type == "lora" else "all weights"
    counts = f"{amount(parts.trained)} of {amount(parts.parameters)} parameters"
    how = "flow matching" if settings.twinflow is None else f"TwinFlow ({settings.twinflow.recipe})"
    data = f"{entries} {'prompts' if settings.data_free else 'images'}"
    _, ranks = world()
    rows = f"{settings.step_rows * ranks} rows a step" + (f" on {ranks} processes" if ranks > 1 else "")
    device = parts.loop.device
    where = device.type if device.type == "cpu" else device
    return f"{parts.model.family}: {kind} ({counts}), {how}, {data}, {rows}, {where}"


def amount(number: int) -> str:
    """A number of parameters with three digits, as 20.4 B."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)
