"""`twinflow sample`: images from a run or an export, by the stock diffusers pipeline."""

import argparse
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinflow.cli.parser import EXAMPLES, Parser, as_path
from twinflow.cli.run_weights import add_weight_options, choose_weights, describe_weights, model_option, print_note
from twinflow.errors import ArgumentError, require

if TYPE_CHECKING:
    from twinflow.formats.generation_config import GenerationConfig
    from twinflow.formats.manifest import Manifest

_FEW, _MANY = 2, 30  # steps where an export does not say
_WEIGHTS = {"ema": "EMA weights", "student": "student weights"}
_MOST_SEED = 2**63 - 1
_MOST_LETTERS = 48  # of a prompt, in a file's name
_EPILOG = f"""{EXAMPLES}
  twinflow sample run --prompt "a red fox" "a blue jay" --steps 2
  twinflow sample run --prompts-file prompts.txt --count 4 --out pictures
  twinflow sample run/export --prompt "a red fox" --width 768 --height 1024"""


def add_options(parser: Parser) -> None:
    """Declares the options."""
    parser.description = (
        "Draws images by the stock diffusers pipeline with what a run trained, and prints the path of each. The PNG "
        "files keep prompt, seed, steps and model in their text."
    )
    parser.epilog = _EPILOG
    parser.is_positional, parser.needs_positional = lambda word: as_path(word).is_dir(), True
    of_run = "(default: as the run's own samples)"
    text = "folder of a run or of an export"
    parser.add_argument("source", nargs="?", type=as_path, metavar="RUN_OR_EXPORT", help=text)
    parser.add_argument("--prompt", nargs="+", action="append", default=[], metavar="TEXT", help="what to draw")
    parser.add_argument("--prompts-file", type=as_path, metavar="FILE", help="a prompt a line: .txt or .jsonl")
    parser.add_argument("--steps", type=int, metavar="N", help=f"network calls of an image, 1 to 4 {of_run}")
    text = "seed of the first image; each further image has the next"
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--count", type=int, default=1, metavar="N", help="images of each prompt")
    parser.add_argument("--out", type=as_path, default=Path("samples"), metavar="DIR", help="folder of the images")
    parser.add_argument("--width", type=int, metavar="PIXELS", help=f"width {of_run}")
    parser.add_argument("--height", type=int, metavar="PIXELS", help=f"height {of_run}")
    text = "target time of each call: few, 0; any, the next time; mul, its own time (default: few)"
    parser.add_argument("--style", choices=("few", "any", "mul"), metavar="NAME", help=text)
    text = "guidance scale; above 1 only where guidance is not trained in (default: 0)"
    parser.add_argument("--guidance", type=float, metavar="X", help=text)
    text = "auto, bfloat16 or float32; auto: bfloat16 on a GPU, float32 on a CPU"
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", metavar="NAME", help=text)
    text = "auto, cpu, cuda, cuda:1, ...; auto: a GPU if there is one"
    parser.add_argument("--device", default="auto", metavar="NAME", help=text)
    add_weight_options(parser)


def run(options: argparse.Namespace) -> int:
    """Draws every prompt."""
    _check(options)
    prompts = _prompts(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="twinflow-") as temporary:
        source = _source(options, Path(temporary))
        _draw(options, prompts, replace(source, generation=_generation(options, source)))
    return 0


@dataclass(frozen=True)
class _Source:
    """An export's folder, manifest and generation settings, and its weights in words."""

    export: Path
    manifest: "Manifest"
    generation: "GenerationConfig | None"
    weights: str


def _check(options: argparse.Namespace) -> None:
    for name, low, high in (
        ("steps", 1, 1000), ("count", 1, 10**6), ("seed", 0, _MOST_SEED - 10**9), ("width", 1, 16384),
        ("height", 1, 16384), ("guidance", 0, 1000),
    ):  # fmt: skip
        value = getattr(options, name)
        require(value is None or low <= value <= high, "sample", name, f"from {low} to {high}", value)
    require(not options.out.exists() or options.out.is_dir(), "sample", "out", "a folder", f"the file {options.out}")


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    for prompt in prompts:
        require(prompt.strip(), "sample", "prompt", "words", repr(prompt), verb="have")
    if options.prompts_file is not None:
        from twinflow.train.data.images import read_prompts

        prompts += read_prompts(options.prompts_file)
    require(prompts, "sample", "prompt", "given (or prompts-file)", "neither")
    return prompts


def _source(options: argparse.Namespace, temporary: Path) -> _Source:
    """The export: the source itself, or the run's weights exported to a temporary folder."""
    from twinflow.formats.manifest import MANIFEST
    from twinflow.pipelines.generator import drawable

    source = options.source
    if not source.is_dir():
        raise ArgumentError("sample", "RUN_OR_EXPORT", "a folder that exists", repr(str(source)))
    if not (source / MANIFEST).is_file():
        restored = choose_weights(options, source)
        export = restored.export(temporary / "export")
        return _Source(export, drawable(export), restored.usage, f"{describe_weights(restored)}, {source}")
    if options.ema or options.student or options.checkpoint != "latest":
        raise ArgumentError("sample", "ema, student and checkpoint", "absent for an export", f"one with {source}")
    manifest = drawable(source)
    return _Source(source, manifest, manifest.usage, f"{_WEIGHTS[manifest.weights]}, {source}")


def _generation(options: argparse.Namespace, source: _Source) -> "GenerationConfig":
    """Model, steps, size and guidance: by the options, else by the export."""
    from twinflow.formats.generation_config import GenerationConfig

    default = source.generation
    model = options.model or (None if default is None else default.model)
    if model is None:
        raise ArgumentError("sample", "model", "given for an export that does not name its base pipeline", "none")
    few = source.manifest.conditioning is not None
    default = default or GenerationConfig(model, _FEW if few else _MANY)
    steps = default.steps if options.steps is None else options.steps
    guidance = default.guidance if options.guidance is None else options.guidance
    if few and steps > 4:
        print_note(options, f"warning: few-step weights are trained for 1 to 4 steps, got {steps}")
    if few and guidance > 1:
        text = f"guidance is in the weights already; {guidance:g} more oversaturates at twice the cost"
        print_note(options, f"warning: {text}")
    return GenerationConfig(model, steps, _size(options, default.size), guidance)


def _size(options: argparse.Namespace, default: tuple[int, int] | None) -> tuple[int, int] | None:
    width, height = options.width, options.height
    if default is None:
        return None if width is None and height is None else (width or height, height or width)
    return (width or default[0], height or default[1])


def _draw(options: argparse.Namespace, prompts: list[str], source: _Source) -> None:
    from twinflow.pipelines.generator import ImageGenerator
    from twinflow.train.logging.quiet import without_loading_bars
    from twinflow.train.model.pipeline_source import pipeline_folder

    generation = source.generation
    assert generation is not None
    with model_option(options):
        folder = pipeline_folder(generation.model)
    _check_size(folder, generation.size)
    dtype, device = _dtype_and_device(options)
    steps = f"{generation.steps} step{'s' if generation.steps > 1 else ''}"
    print_note(options, f"{source.weights}, on {generation.model}, {steps}, {device}")
    with without_loading_bars():
        generator = ImageGenerator(folder, source.export, style=options.style, dtype=dtype, device=device)
    style = options.style or ("few" if source.manifest.conditioning else "the pipeline's own")
    about = {"steps": generation.steps, "style": style, "guidance": generation.guidance}
    about |= {"model": generation.model, "weights": source.weights}
    seed, size, guidance = options.seed, generation.size, generation.guidance
    for prompt in prompts:
        for _ in range(options.count):
            image = generator.generate(prompt, seed=seed, steps=generation.steps, size=size, guidance=guidance)
            print(_write_png(image, options.out, {"prompt": prompt, "seed": seed, **about}), flush=True)
            seed += 1


def _check_size(folder: Path, size: tuple[int, int] | None) -> None:
    from twinflow.train.data.buckets import require_multiples
    from twinflow.train.data.encoders import Encoders

    multiple = Encoders(folder).multiple
    for name, edge in zip(("width", "height"), size or (), strict=False):
        require_multiples("sample", name, (edge,), multiple)


def _dtype_and_device(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's own complaints, of several lines
        reason = str(error).split(".")[0]
        raise ArgumentError("sample", "device", "one of this machine's", f"{name!r}: {reason}") from None
    dtype = ("float32" if device.type == "cpu" else "bfloat16") if options.dtype == "auto" else options.dtype
    return getattr(torch, dtype), device


def _write_png(image: Any, folder: Path, about: Mapping[str, object]) -> Path:
    """Writes an image under a name that no other file has.

    Args:
        about: how it was drawn, kept in the file's text; `prompt`, `steps` and `seed` make its name.

    Returns:
        The file.
    """
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    software = f"twinflow {version('twinflow')}"
    for name, value in {**about, "width": image.width, "height": image.height, "software": software}.items():
        text.add_itxt(name, str(value))
    words = re.sub(r"\W+", "-", str(about["prompt"]).lower())[:_MOST_LETTERS].strip("-_") or "image"
    stem = f"{words}-{about['steps']}steps-seed{about['seed']}"
    for number in range(1, 10**6):
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        try:
            with open(path, "xb") as file:
                image.save(file, "PNG", pnginfo=text)
        except FileExistsError:
            continue
        return path
    raise ArgumentError(
        "sample", "out", f"a free name like {stem}.png", f"{folder} with a million of them", verb="have"
    )
