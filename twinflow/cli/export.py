"""`twinflow export`: a run's weights as files for diffusers or ComfyUI."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from twinflow.cli.parser import EXAMPLES, Parser, as_path
from twinflow.cli.run_weights import add_weight_options, choose_weights, describe_weights
from twinflow.errors import require

if TYPE_CHECKING:
    from twinflow.formats.manifest import Manifest

_EPILOG = f"""{EXAMPLES}
  twinflow export run
  twinflow export run --student --checkpoint checkpoint-002000 --out early
  twinflow export run --format comfyui --out lora"""


def add_options(parser: Parser) -> None:
    """Declares the options."""
    parser.description = "Writes what a run trained: its LoRA, or the whole model where all weights were trained."
    parser.epilog = _EPILOG
    parser.add_argument("run_folder", type=as_path, metavar="RUN", help="folder of the run: its output_dir")
    text = "diffusers; comfyui: Qwen-Image and Z-Image"
    parser.add_argument("--format", default="diffusers", metavar="NAME", help=text)
    parser.add_argument("--out", type=as_path, metavar="DIR", help="folder to write (default: RUN/export)")
    parser.add_argument("--merge-base", action="store_true", help="write base_lora and the trained LoRA as one")
    add_weight_options(parser)


def run(options: argparse.Namespace) -> int:
    """Exports, and lists the files."""
    from twinflow.formats.manifest import LAYOUTS, MANIFEST, read_manifest

    layouts = f"one of {', '.join(LAYOUTS)}"
    require(options.format in LAYOUTS, "export", "format", layouts, repr(options.format))
    restored = choose_weights(options, options.run_folder)
    out = options.run_folder / "export" if options.out is None else options.out
    folder = restored.export(out, format=options.format, merge_base=options.merge_base)
    manifest = read_manifest(folder)
    assert manifest is not None
    print(f"{folder}: {describe_weights(restored)}, from {restored.checkpoint}")
    for path in sorted(path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == MANIFEST):
        print(f"  {path.name}  {_size(path)}")
    print(_next_step(folder, manifest))
    return 0


def _next_step(folder: Path, manifest: "Manifest") -> str:
    from twinflow.models.registry import FAMILIES

    if manifest.layout == "comfyui":
        return f"for ComfyUI's folder {'models/loras' if manifest.kind == 'lora' else 'models/diffusion_models'}"
    if not FAMILIES[manifest.family].samples_in_pipelines:
        return "draw with it: twinflow.sampling.sample(); a LoRA also goes into pipe.load_lora_weights()"
    return f"draw with it: twinflow sample {shlex.quote(str(folder))} --prompt '...'"


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"
