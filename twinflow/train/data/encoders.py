"""`Encoders`: one pipeline's images -> latents, prompts -> conditions; known before they are loaded."""

import gc
import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from twinflow.errors import ArgumentError, require
from twinflow.formats.variants import variant_of_pipeline
from twinflow.models import FlowModel
from twinflow.models import load as load_student
from twinflow.models.autoencoders import Autoencoder

Condition = dict[str, torch.Tensor]
_SHORT = 60  # bytes of a prompt, which no encoder has too few tokens for
_WINDOW = 1 << 16  # bytes of a weight file that are looked at in each of its sixteenths


class Encoders:
    """The autoencoder and the text encoders of a pipeline's folder, loaded when something must be encoded.

    Args:
        folder: the pipeline on disk; for a hub name, what `DiffusionPipeline.download(name)` returns.
        dtype: of autoencoder and text encoders, and so of what is kept.
        student: whose `encode_prompt` is used; None: the family's, without weights. A UNet must be given.

    Raises:
        ValueError: no pipeline there, or one whose autoencoder or model is not known.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        student: FlowModel | None = None,
    ) -> None:
        self.folder, self.dtype, self.device = Path(folder), dtype, torch.device(device)
        index = _config(self.folder / "model_index.json")
        vae = _config(self.folder / "vae" / "config.json")
        self.student = student or _without_weights(self.folder)
        self.factor = self.student.autoencoder.factor(vae)
        self.vae_channels = vae.get(self.student.autoencoder.channels_setting)
        texts = sorted(name for name in index if name.startswith(("text_encoder", "tokenizer")))
        self.vae_identity = f"{identity(self.folder / 'vae')} {dtype}"
        parts = [f"{name} {identity(self.folder / name)}" for name in texts if (self.folder / name).is_dir()]
        self.text_identity = f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()} {dtype}"
        self._tokenizers = {name: index[name] for name in texts if name.startswith("tokenizer")}
        self.pipeline = str(index.get("_class_name"))
        self._kept = False
        self._pipe: Any = None

    @property
    def family(self) -> str:
        """Of `twinflow.models.FAMILIES`."""
        return self.student.family

    @property
    def multiple(self) -> int:
        """What heights and widths of images must be multiples of, px."""
        return self.factor * self.student.latent_multiple()

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the latents of an image of a size in pixels."""
        return self.student.latent_channels(), size[0] // self.factor, size[1] // self.factor

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, height, width) in -1 .. 1 -> latents (B, C, H, W) on the CPU; see `encode_images`."""
        return encode_images(self._loaded(), pixels, self.student.autoencoder)

    def prompts(self, prompts: Sequence[str]) -> list[Condition]:
        """The condition of each prompt, without padding, on the CPU; `collate` makes batches of them."""
        with torch.no_grad():
            cond = self.student.encode_prompt(self._loaded(), list(prompts))
        for name, width in self.student.condition_widths().items():
            wanted = f"of width {width}, which the {self.student.component} takes"
            got = f"{cond[name].shape[-1]} from the text encoders in {self.folder}"
            require(cond[name].shape[-1] == width, "Encoders", name, wanted, got)
        return uncollate(cond)

    def unread_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Of each prompt, how many of its last tokens no text encoder reads; loads tokenizers alone.

        What a pipeline writes around a prompt, a template or an instruction, is not counted.
        """
        import diffusers
        import transformers

        unread = [0] * len(prompts)
        long = [k for k, prompt in enumerate(prompts) if len(prompt.encode()) > _SHORT]
        encode = getattr(getattr(diffusers, self.pipeline, None), "encode_prompt", None)
        if not long or encode is None:
            return unread
        most = inspect.signature(encode).parameters.get("max_sequence_length")
        bounds = [most.default] if most is not None and isinstance(most.default, int) else []
        counts = []
        for name, (library, kind) in self._tokenizers.items():
            if library != "transformers" or not (self.folder / name).is_dir():
                continue
            tokenizer = getattr(transformers, kind).from_pretrained(self.folder / name)
            limit = min([tokenizer.model_max_length, *bounds])
            tokens = tokenizer([prompts[k] for k in long], verbose=False)["input_ids"]
            counts.append([max(0, len(row) - limit) for row in tokens])
        for k, of in zip(long, zip(*counts, strict=True), strict=False):
            unread[k] = min(of)
        return unread

    def negative_prompt(self, prompt: str) -> Condition:
        """What the stock pipeline guides away from with a negative prompt; "": with none."""
        with torch.no_grad():
            return uncollate(self.student.encode_negative_prompt(self._loaded(), [prompt]))[0]

    def free(self) -> None:
        """Lets go of the pipeline; it is loaded again where needed."""
        if self._pipe is not None and not self._kept:
            self._pipe = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Lets go of the pipeline at the end only: several caches are built with what is loaded once."""
        self._kept = True
        try:
            yield
        finally:
            self._kept = False
            self.free()

    def _loaded(self) -> Any:
        if self._pipe is None:
            from diffusers import DiffusionPipeline

            bare: dict[str, Any] = {self.student.component: None}
            variant = variant_of_pipeline(self.folder)
            pipe = DiffusionPipeline.from_pretrained(self.folder, dtype=self.dtype, variant=variant, **bare)
            self._pipe = pipe.to(self.device)
        return self._pipe


@torch.no_grad()
def encode_images(pipe: Any, pixels: torch.Tensor, autoencoder: type[Autoencoder]) -> torch.Tensor:
    """Images as the latents that the pipeline's transformer expects: the mode of their distribution, scaled.

    The autoencoder runs in its own dtype, in which the latents are returned; they are scaled in float32 or wider.

    Args:
        pixels: (B, 3, height, width) in -1 .. 1.

    Returns:
        (B, C, H, W), on the CPU.

    Raises:
        ValueError: an autoencoder of another kind.
        FloatingPointError: latents that are not finite.
    """
    vae = pipe.vae
    autoencoder.check(vae, "encode_images")
    latents = autoencoder.encode(vae, pixels.to(vae.device, vae.dtype)).to(vae.dtype).cpu()
    if not latents.isfinite().all():
        name = type(vae).__name__
        raise FloatingPointError(f"latents must be finite, got others from a {name} in {vae.dtype}")
    return latents


def uncollate(cond: Condition) -> list[Condition]:
    """A batch's condition as one per row, on the CPU; prompts of their own length where `prompt_lengths` says it."""
    rows = []
    for k in range(len(cond["prompt_embeds"])):
        row = {name: leaf[k].detach().cpu() for name, leaf in cond.items()}
        if "prompt_lengths" in row:
            row["prompt_embeds"] = row["prompt_embeds"][: int(row["prompt_lengths"])]
        rows.append({name: leaf.clone().contiguous() for name, leaf in row.items()})
    return rows


def collate(rows: Sequence[Condition]) -> Condition:
    """The conditions of single prompts as a batch's: zeros after prompts that are shorter than the longest.

    Raises:
        ValueError: conditions with different entries, or of different models.
    """
    names = list(rows[0])
    if any(list(row) != names for row in rows):
        raise ArgumentError("collate", "rows", "the same entries", sorted({*map(tuple, rows)}), verb="have")
    trimmed = "prompt_lengths" in names
    try:
        return {
            name: pad_sequence([row[name] for row in rows], batch_first=True)
            if trimmed and name == "prompt_embeds"
            else torch.stack([row[name] for row in rows])
            for name in names
        }
    except RuntimeError as error:
        raise ArgumentError("collate", "rows", "of one model's prompts", error) from None


def identity(folder: Path) -> str:
    """A hash of weights and settings: of small files the whole, of large ones the size and seventeen samples.

    Raises:
        ValueError: no such folder.
    """
    require(folder.is_dir(), "Encoders", "folder", folder.name, f"none in {folder.parent}", verb="have")
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder)} {size} ".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            if size <= 32 * _WINDOW:
                found.update(file.read())
                continue
            for k in range(17):
                file.seek((size - _WINDOW) * k // 16)
                found.update(file.read(_WINDOW))
    return found.hexdigest()


def _config(path: Path) -> dict[str, Any]:
    wanted = "a diffusers pipeline"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError("Encoders", "folder", wanted, f"{path}: {error}", verb="hold") from None
    require(isinstance(found, dict), "Encoders", "folder", wanted, f"{path} without an object", verb="hold")
    return found


def _without_weights(folder: Path) -> FlowModel:
    """The family's student with an empty transformer: it knows how prompts are encoded and what latents are like."""
    import diffusers

    config = _config(folder / "transformer" / "config.json")
    name = config.get("_class_name")
    cls: Any = getattr(diffusers, str(name), None)
    known = isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)
    require(known, "Encoders", "folder", "a transformer of diffusers", repr(name), verb="have")
    with torch.device("meta"):
        return load_student(cls.from_config(config))
