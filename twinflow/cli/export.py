"""`twinflow export`: a run's weights as files for diffusers or ComfyUI."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from twinflow.cli.run_weights import add_weight_options, chosen_weights, described

if TYPE_CHECKING:
    from twinflow.formats.manifest import Manifest


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.description = "Writes what a run trained: its LoRA, or the whole model where all weights were trained."
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run, output_dir of its config")
    parser.add_argument("--format", default="diffusers", help="diffusers; comfyui: for Qwen-Image and Z-Image")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: RUN/export)")
    parser.add_argument("--merge-base", action="store_true", help="one LoRA of base_lora and the trained one")
    add_weight_options(parser)


def run(options: argparse.Namespace) -> int:
    """Exports, and lists the files."""
    from twinflow.formats.manifest import LAYOUTS, MANIFEST, read_manifest

    if options.format not in LAYOUTS:
        raise ValueError(f"export: format must be one of {', '.join(LAYOUTS)}, got {options.format!r}")
    found = chosen_weights(options, options.run_folder)
    out = options.run_folder / "export" if options.out is None else options.out
    folder = found.export(out, format=options.format, merge_base=options.merge_base)
    manifest = read_manifest(folder)
    assert manifest is not None
    print(f"{folder}: {described(found)}, from {found.checkpoint}")
    for path in sorted(path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == MANIFEST):
        print(f"  {path.name}  {_size(path)}")
    print(_use(folder, manifest))
    return 0


def _use(folder: Path, manifest: "Manifest") -> str:
    from twinflow.models.registry import FAMILIES

    if manifest.layout == "comfyui":
        return f"for ComfyUI's folder {'models/loras' if manifest.kind == 'lora' else 'models/diffusion_models'}"
    if not FAMILIES[manifest.family].samples_in_pipelines:
        return "draw with it: twinflow.sampling.sample(); a LoRA also goes into pipe.load_lora_weights()"
    return f"draw with it: twinflow sample {shlex.quote(str(folder))} --prompt '...'"


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"
