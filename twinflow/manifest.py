"""`Manifest`: the small JSON beside saved weights that says how they are to be used, and the conditioning's tensors.

Files come from strangers: everything is JSON or safetensors, nothing is unpickled, and what does not fit is refused.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from twinflow.conditioning import MODES

MANIFEST = "twinflow.json"
CONDITIONING = "twinflow_conditioning.safetensors"
SECOND_EMBEDDERS = ("time_text_embed_2", "time_embed_2", "t_embedder_2", "time_embedding_2")
SIGN_TABLE = "time_sign_embed"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a folder of saved weights holds.

    Args:
        family: of `twinflow.models.FAMILIES`.
        conditioning: mode that the weights were trained with; None: plain.
        kind: `lora` or `full`.
        weights: `student` or `ema`.
        format: version of this file.
    """

    family: str
    conditioning: str | None
    kind: str
    weights: str = "student"
    format: int = FORMAT

    @property
    def needs_conditioning(self) -> bool:
        """Whether the weights compute something else in a model without the conditioning (one step, r = 0)."""
        return self.conditioning is not None and "dual" in self.conditioning


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes the JSON into a folder."""
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """Reads a folder's JSON; None where there is none.

    Raises:
        ValueError: the file is damaged or of a later version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        manifest = Manifest(**saved)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} must be a file that export wrote, got one that cannot be read: {error}") from None
    if manifest.format != FORMAT:
        raise ValueError(f"{path} must be of format {FORMAT}, got {manifest.format}: it needs a later version")
    if manifest.conditioning not in (None, *MODES) or manifest.kind not in ("lora", "full"):
        raise ValueError(f"{path} must name a known conditioning and kind, got {saved}")
    return manifest


def write_conditioning(network: nn.Module, folder: Path) -> None:
    """Writes the tensors of a conditioned transformer's new submodules; nothing where it has none."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in conditioning_tensors(network).items()}
    if tensors:
        save_file(tensors, folder / CONDITIONING, metadata={"format": "pt"})


def conditioning_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor of the conditioning's submodules; the tensors themselves."""
    roots = (*SECOND_EMBEDDERS, SIGN_TABLE)
    return {n: p for n, p in network.named_parameters() if n.partition(".")[0] in roots}


def saved_conditioning(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of the conditioning saved in a folder: beside a LoRA, or among a model's own weights.

    Raises:
        ValueError: a file is damaged.
    """
    beside = folder / CONDITIONING
    found: dict[str, torch.Tensor] = {}
    for path in [beside] if beside.exists() else sorted(folder.glob("*.safetensors")):
        found |= read_tensors(path, (*SECOND_EMBEDDERS, SIGN_TABLE))
    return found


def read_tensors(path: Path, roots: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or those whose name begins with one of `roots`.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [n for n in file.keys() if roots is None or n.partition(".")[0] in roots]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got a damaged one: {error}") from None


def inferred_mode(tensors: dict[str, torch.Tensor], folder: Path) -> str | None:
    """The mode of weights saved without a manifest.

    Raises:
        ValueError: a sign table alone, which `sign` and `midpoint+sign` share.
    """
    dual = any(name.partition(".")[0] in SECOND_EMBEDDERS for name in tensors)
    sign = any(name.partition(".")[0] == SIGN_TABLE for name in tensors)
    if sign and not dual:
        raise ValueError(
            f"load: conditioning must be given for {folder}, whose sign table was trained as 'sign' or 'midpoint+sign'"
        )
    return ("dual+sign" if sign else "dual") if dual else None


@torch.no_grad()
def put_conditioning(network: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copies saved tensors into a conditioned transformer.

    Raises:
        ValueError: names or shapes differ; nothing is then copied.
    """
    mine = conditioning_tensors(network)
    if mine.keys() != tensors.keys():
        difference = sorted(mine.keys() ^ tensors.keys())
        raise ValueError(f"{where}: conditioning must have {', '.join(mine)}, got a difference in {difference[:3]}")
    for name, value in mine.items():
        if value.shape != tensors[name].shape:
            wanted, got = tuple(value.shape), tuple(tensors[name].shape)
            raise ValueError(f"{where}: {name} must be of shape {wanted}, got {got}")
    for name, value in mine.items():
        value.copy_(tensors[name])
