"""`SampleSet`: images that a run drew at one time, and what they were drawn with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinflow.train.config.run_folder import RunFolder


@dataclass(frozen=True)
class Sample:
    """An image: the file, and what `samples.json` says of it."""

    path: Path
    prompt: str
    steps: int
    style: str
    guidance: float
    seed: int


@dataclass(frozen=True)
class SampleSet:
    """The images of a time.

    Args:
        step: steps taken then.
        weights: ema, student or base.
        images: in the order of `samples.json`.
    """

    step: int
    weights: str
    images: list[Sample]


def read_samples(run: RunFolder, complaints: list[str]) -> tuple[list[SampleSet], SampleSet | None]:
    """The sets of a run by step, and that of the base model.

    Args:
        complaints: gets a line for each set that cannot be read.
    """
    sets, base = [], None
    folders = sorted(path for path in run.samples.glob("*") if path.is_dir() and not path.name.startswith("."))
    for folder in folders:
        try:
            part = _read(folder)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            complaints.append(f"samples/{folder.name} is left out: {reason}")
            continue
        if part.weights == "base":
            base = part
        else:
            sets.append(part)
    return sorted(sets, key=lambda part: part.step), base


def _read(folder: Path) -> SampleSet:
    record = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    images = [_sample(folder, image) for image in record["images"]]
    return SampleSet(int(record["step"] or 0), str(record["weights"]), images)


def _sample(folder: Path, image: dict[str, Any]) -> Sample:
    """A file of the folder itself: a page must not show what lies elsewhere."""
    name = str(image["file"])
    path = folder / name
    if path.name != name or path.is_symlink():
        raise ValueError(f"{name!r} is no file of its own")
    return Sample(
        path, str(image["prompt"]), int(image["steps"]), str(image["style"]), float(image["guidance"]),
        int(image["seed"]),
    )  # fmt: skip


def thinned(sets: list[SampleSet], most: int) -> list[SampleSet]:
    """At most so many sets, the first and the last among them, the others evenly between."""
    if len(sets) <= most:
        return sets
    if most < 2:
        return sets[len(sets) - most :]
    return [sets[round(k * (len(sets) - 1) / (most - 1))] for k in range(most)]
