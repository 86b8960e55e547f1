"""`ImageGenerator`: a stock diffusers pipeline that draws with an export, as the export was trained."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from twinflow.errors import ArgumentError, require
from twinflow.formats.manifest import Manifest, read_manifest
from twinflow.formats.variants import variant_of_pipeline
from twinflow.models.registry import FAMILIES
from twinflow.pipelines.attach import attach
from twinflow.scheduler import TwinFlowScheduler


class ImageGenerator:
    """Loads the pipeline and attaches the export.

    Args:
        model: folder of the pipeline underneath.
        export: folder that `twinflow.export.export` wrote.
        style: target time of each call, `few`, `any` or `mul`; None: `few`, and the pipeline's own sampler for weights
            that were trained without TwinFlow.
        dtype: what it computes in.
        device: where.

    Raises:
        ValueError: no export for diffusers, one of a UNet, or a pipeline that does not load or is of another model.
    """

    def __init__(
        self,
        model: str | Path,
        export: str | Path,
        *,
        style: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.manifest = drawable(Path(export))
        # The values of `safetensors` only: a file from a stranger is never unpickled.
        try:
            variant = variant_of_pipeline(Path(model))
            pipe: Any = DiffusionPipeline.from_pretrained(model, dtype=dtype, use_safetensors=True, variant=variant)
        except ImportError:
            raise
        except Exception as error:  # whatever diffusers and transformers find in a folder that anyone may have written
            brief = " ".join(str(error).split())[:300]
            wanted = "a diffusers pipeline that loads"
            raise ArgumentError("ImageGenerator", "model", wanted, f"{model}: {brief}") from error
        own = pipe.scheduler
        attach(pipe, export, style=style or "few")
        if style is None and self.manifest.conditioning is None:
            pipe.register_modules(scheduler=own)
        pipe.set_progress_bar_config(disable=True)
        self._pipe = pipe.to(device)

    def generate(
        self, prompt: str, *, seed: int, steps: int, size: tuple[int, int] | None = None, guidance: float = 0.0
    ) -> Any:
        """An image, the same for the same arguments on the same machine.

        Args:
            prompt: what to draw.
            seed: of all noise.
            steps: of the sampler.
            size: width and height, pixels; None: the pipeline's own.
            guidance: scale, in effect above 1.

        Returns:
            A PIL image.

        Raises:
            ValueError: what the pipeline does not take.
        """
        pipe = self._pipe
        if isinstance(pipe.scheduler, TwinFlowScheduler):
            pipe.register_modules(scheduler=TwinFlowScheduler.from_config(pipe.scheduler.config, seed=seed))
        shape = {} if size is None else {"width": size[0], "height": size[1]}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "twinflow.attach: guidance must be off")  # it was asked for
            return pipe(
                prompt,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
                **shape,
                **self._guided(guidance),
                **self._as_trained(),
            ).images[0]

    def _guided(self, scale: float) -> dict[str, Any]:
        """Guidance as each pipeline wants it, or none."""
        guided, family = scale > 1, FAMILIES[self.manifest.family]
        arguments: dict[str, Any] = {"negative_prompt": ""} if guided else {}
        if family.guidance is not None:
            arguments["guidance_scale"] = family.guidance  # an input of its transformer, and so it was trained
        return arguments | {family.guidance_argument: scale if guided else family.guidance_off}

    def _as_trained(self) -> dict[str, Any]:
        """What the pipeline does otherwise when it is called than when it encodes prompts, and sizes as they are."""
        called = inspect.signature(type(self._pipe).__call__).parameters
        encoding = inspect.signature(self._pipe.encode_prompt).parameters
        found: dict[str, Any] = {"use_resolution_binning": False} if "use_resolution_binning" in called else {}
        if "max_sequence_length" in called and "max_sequence_length" in encoding:
            found["max_sequence_length"] = encoding["max_sequence_length"].default
        return found


def drawable(export: Path) -> Manifest:
    """The manifest of an export that a stock pipeline draws with.

    Raises:
        ValueError: no export, one for ComfyUI, or one of a UNet.
    """
    manifest = read_manifest(export)
    if manifest is None:
        raise ArgumentError("ImageGenerator", "export", "a folder with a twinflow.json", f"{export} without one")
    layout, family = manifest.layout, manifest.family
    require(layout == "diffusers", "ImageGenerator", "export", "of format 'diffusers'", f"{layout!r} in {export}")
    require(family in FAMILIES, "ImageGenerator", "export", f"of one of {', '.join(FAMILIES)}", repr(family))
    hint = (
        "stock pipelines cannot sample a UNet export in few steps; "
        "use twinflow.sampling.sample(twinflow.train.restore.restore_run(RUN).student, ...)"
    )
    require(FAMILIES[family].samples_in_pipelines, "ImageGenerator", "export", "a transformer's", "a UNet's", hint)
    return manifest
