"""`variant_of()`: which variant of its weights a model's folder has, `fp16` of `model.fp16.safetensors` say."""

import re
from collections.abc import Iterable
from pathlib import Path

from twinflow.errors import require

# Sharded ones are called `model.fp16-00001-of-00002.safetensors`, before 2024 `model-00001-of-00002.fp16.safetensors`.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<new>[^.]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<old>[^.]+))?\.(?:safetensors|bin)"
)


def variant_among(files: Iterable[str], where: object) -> str | None:
    """The variant that is to be asked for where a model's weights are there in no other form.

    Args:
        files: names in a model's folder.
        where: that folder, for the message.

    Returns:
        Its name; None: there are weights without a variant, or none at all.

    Raises:
        ArgumentError: several variants, and none that goes before the others.
    """
    found = [match for match in map(_WEIGHTS.fullmatch, files) if match]
    names = {match["new"] or match["old"] for match in found}
    if None in names or not names:
        return None
    one, got = len(names) == 1, f"{', '.join(sorted(map(str, names)))} in {where}"
    require(one, "load", "weights", "in one variant", got, "remove all but one", "be there")
    return names.pop()


def variant_of(folder: Path) -> str | None:
    """`variant_among` the files of a model's folder."""
    return variant_among((path.name for path in folder.iterdir()), folder) if folder.is_dir() else None


def variant_of_pipeline(folder: Path) -> str | None:
    """The variant of those models of a pipeline's folder that have no other weights; diffusers loads the rest plainly.

    Raises:
        ArgumentError: models in several variants.
    """
    found = {path.parent.name: variant_of(path.parent) for path in sorted(folder.glob("*/config.json"))}
    names = sorted({variant for variant in found.values() if variant is not None})
    got = f"{', '.join(f'{name} in {variant}' for name, variant in found.items() if variant)} in {folder}"
    require(len(names) < 2, "load", "models", "in one variant", got, "download the pipeline in one", "be there")
    return names[0] if names else None


def lacks_weights(folder: Path) -> bool:
    """Whether a model of a pipeline's folder has a configuration and no weights."""
    return not all(
        any(_WEIGHTS.fullmatch(file.name) for file in path.parent.iterdir()) for path in folder.glob("*/config.json")
    )


def variant_on_the_hub(name: str, subfolder: str | None = None) -> str | None:
    """The variant in which a hub repository has a model's weights, where it has no others.

    Args:
        name: of the repository.
        subfolder: of the model, "": the repository itself; None: any model of a pipeline.

    Returns:
        Its name; None: there is none, or no way to the hub.
    """
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        files = list_repo_files(name)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None
    models: dict[str, list[str]] = {}
    for file in files:
        folder, _, base = file.rpartition("/")
        models.setdefault(folder, []).append(base)
    chosen = [folder for folder in sorted(models) if folder.count("/") == 0 and subfolder in (None, folder)]
    return next((found for folder in chosen if (found := variant_among(models[folder], name)) is not None), None)
