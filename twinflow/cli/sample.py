"""`twinflow sample`: images from a run or an export, by the stock diffusers pipeline."""

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinflow.cli.png_file import new_png
from twinflow.cli.run_weights import add_weight_options, chosen_weights, described, named_model, say

if TYPE_CHECKING:
    from twinflow.formats.generation_config import GenerationConfig
    from twinflow.formats.manifest import Manifest

_FEW, _MANY = 2, 30  # steps where an export does not say
_WEIGHTS = {"ema": "EMA weights", "student": "student weights"}
_MOST_SEED = 2**63 - 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.description = (
        "Draws images by the stock diffusers pipeline with what a run trained, and prints the path of each: PNG files "
        "that keep prompt, seed, steps and model in their text."
    )
    of_run = "(default: as the run's own samples)"
    parser.add_argument("source", type=Path, metavar="RUN_OR_EXPORT", help="folder of a run, or of an export")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to draw; may be repeated")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="a prompt a line: .txt or .jsonl")
    parser.add_argument("--steps", type=int, help=f"network calls of an image, 1 to 4 {of_run}")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; each further one has the next")
    parser.add_argument("--count", type=int, default=1, help="images of each prompt")
    parser.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="folder of the images")
    parser.add_argument("--width", type=int, help=f"pixels {of_run}")
    parser.add_argument("--height", type=int, help=f"pixels {of_run}")
    parser.add_argument(
        "--style", choices=("few", "any", "mul"), help="few, any or mul: each call's target (default: few)"
    )
    parser.add_argument(
        "--guidance", type=float, metavar="SCALE", help="above 1 where it is not trained in (default: 0)"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: bfloat16 on a GPU, else float32"
    )
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu; auto: a GPU where there is one")
    add_weight_options(parser)


def run(options: argparse.Namespace) -> int:
    """Draws every prompt."""
    _check(options)
    prompts = _prompts(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="twinflow-") as temporary:
        found = _source(options, Path(temporary))
        found = replace(found, usage=_usage(options, found))
        _draw(options, prompts, found)
    return 0


@dataclass(frozen=True)
class _Source:
    """What is drawn with: an export's folder and manifest, how it is used, and what its weights are, in words."""

    export: Path
    manifest: "Manifest"
    usage: "GenerationConfig | None"
    weights: str


def _check(options: argparse.Namespace) -> None:
    for name, low, high in (
        ("steps", 1, 1000), ("count", 1, 10**6), ("seed", 0, _MOST_SEED - 10**9), ("width", 1, 16384),
        ("height", 1, 16384),
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"sample: {name} must be from {low} to {high}, got {value}")
    if options.guidance is not None and not 0 <= options.guidance <= 1000:
        raise ValueError(f"sample: guidance must be from 0 to 1000, got {options.guidance}")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"sample: out must be a folder, got the file {options.out}")


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(f"sample: prompt must have words, got {prompt!r}")
    if options.prompts_file is not None:
        from twinflow.train.data.images import read_prompts

        prompts += read_prompts(options.prompts_file)
    if not prompts:
        raise ValueError("sample: prompt must be given (or prompts-file), got neither")
    return prompts


def _source(options: argparse.Namespace, temporary: Path) -> _Source:
    """The export: what is given, or one of the run's weights in a temporary folder."""
    from twinflow.formats.manifest import MANIFEST
    from twinflow.pipelines.generator import drawable

    source = options.source
    if not source.is_dir():
        raise ValueError(f"sample: RUN_OR_EXPORT must be a folder, got {str(source)!r}, which does not exist")
    if not (source / MANIFEST).is_file():
        found = chosen_weights(options, source)
        export = found.export(temporary / "export")
        return _Source(export, drawable(export), found.usage, f"{described(found)}, {source}")
    if options.ema or options.student or options.checkpoint != "latest":
        raise ValueError(f"sample: ema, student and checkpoint must be absent for an export, got one with {source}")
    manifest = drawable(source)
    return _Source(source, manifest, manifest.usage, f"{_WEIGHTS[manifest.weights]}, {source}")


def _usage(options: argparse.Namespace, source: _Source) -> "GenerationConfig":
    """How it is drawn with: what is asked for, else as the export says."""
    from twinflow.formats.generation_config import GenerationConfig

    said = source.usage
    model = options.model or (None if said is None else said.model)
    if model is None:
        raise ValueError("sample: model must be given for an export that does not say what is underneath, got none")
    few = source.manifest.conditioning is not None
    usual = said or GenerationConfig(model, _FEW if few else _MANY)
    steps = usual.steps if options.steps is None else options.steps
    guidance = usual.guidance if options.guidance is None else options.guidance
    if few and steps > 4:
        say(options, f"warning: steps must be 1 to 4 for what few-step weights are trained for, got {steps}")
    if few and guidance > 1:
        say(options, f"warning: guidance is in the weights already; {guidance:g} more oversaturates at twice the cost")
    return GenerationConfig(model, steps, _size(options, usual.size), guidance)


def _size(options: argparse.Namespace, usual: tuple[int, int] | None) -> tuple[int, int] | None:
    width, height = options.width, options.height
    if usual is None:
        return None if width is None and height is None else (width or height, height or width)
    return (width or usual[0], height or usual[1])


def _draw(options: argparse.Namespace, prompts: list[str], source: _Source) -> None:
    from twinflow.pipelines.generator import ImageGenerator
    from twinflow.train.model.pipeline_source import pipeline_folder

    usage = source.usage
    assert usage is not None
    with named_model(options):
        folder = pipeline_folder(usage.model)
    _check_size(folder, usage.size)
    dtype, device = _place(options)
    say(options, f"{source.weights}, on {usage.model}, {usage.steps} step{'s' if usage.steps > 1 else ''}, {device}")
    _without_bars()
    generator = ImageGenerator(folder, source.export, style=options.style, dtype=dtype, device=device)
    style = options.style or ("few" if source.manifest.conditioning else "the pipeline's own")
    about = {"steps": usage.steps, "style": style, "guidance": usage.guidance}
    about |= {"model": usage.model, "weights": source.weights}
    seed = options.seed
    for prompt in prompts:
        for _ in range(options.count):
            image = generator.generate(prompt, seed=seed, steps=usage.steps, size=usage.size, guidance=usage.guidance)
            print(new_png(image, options.out, {"prompt": prompt, "seed": seed, **about}), flush=True)
            seed += 1


def _without_bars() -> None:
    """A bar for each part of the pipeline that is read says little; downloads keep theirs."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()


def _check_size(folder: Path, size: tuple[int, int] | None) -> None:
    from twinflow.train.data.encoders import Encoders

    multiple = Encoders(folder).multiple
    for name, edge in zip(("width", "height"), size or (), strict=False):
        if edge % multiple:
            near = max(multiple, round(edge / multiple) * multiple)
            raise ValueError(f"sample: {name} must be a multiple of {multiple} pixels (such as {near}), got {edge}")


def _place(options: argparse.Namespace) -> tuple[Any, Any]:
    """The dtype and the device."""
    import torch

    cuda = torch.cuda.is_available()
    asked = ("cuda" if cuda else "cpu") if options.device == "auto" else options.device
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's own complaints, of several lines
        raise ValueError(
            f"sample: device must be one of this machine's, got {asked!r}: {str(error).split('.')[0]}"
        ) from None
    dtype = ("float32" if device.type == "cpu" else "bfloat16") if options.dtype == "auto" else options.dtype
    return getattr(torch, dtype), device
