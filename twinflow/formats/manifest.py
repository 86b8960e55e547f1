"""`Manifest`: the small JSON beside saved weights that says how they are to be used, and the conditioning's tensors.

Files come from strangers: everything is JSON or safetensors, nothing is unpickled, and what does not fit is refused.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from twinflow.conditioning import MODES, SIGN_TABLE, conditioning_tensors
from twinflow.errors import ArgumentError, require
from twinflow.formats.generation_config import GenerationConfig
from twinflow.interface import copy_tensors

MANIFEST = "twinflow.json"
LORA = "pytorch_lora_weights.safetensors"  # diffusers' default
CONDITIONING = "twinflow_conditioning.safetensors"
COMFYUI_LORA = "comfyui_lora.safetensors"
COMFYUI_MODEL = "comfyui_model.safetensors"
ADAPTER_SETTINGS = "lora_adapter_metadata"  # diffusers' key for an adapter's configuration in a LoRA file
FORMAT = 1
LAYOUTS = ("diffusers", "comfyui")
# Stock diffusers would load such weights without their second time embedder. Its own error then carries this sentence:
# it stands where an unknown value is refused by name.
REFUSAL = "these weights need their second time embedder: call twinflow.attach(pipe, folder)"
# Loaded without their settings (a state dict, a hot swap) such LoRA weights are refused for a tensor of no layer, and
# for one with a row too many.
_MARK = "call_twinflow_attach.lora_A.weight"


@dataclass(frozen=True)
class Manifest:
    """What a folder of saved weights holds.

    Args:
        family: of `twinflow.models.FAMILIES`.
        conditioning: mode that the weights were trained with; None: plain.
        kind: `lora` or `full`.
        weights: `student` or `ema`.
        layout: whose key names the weights have, `diffusers` or `comfyui`.
        format: version of this file.
        usage: how it is drawn with; None: the file does not say.
    """

    family: str
    conditioning: str | None
    kind: str
    weights: str = "student"
    layout: str = "diffusers"
    format: int = FORMAT
    usage: GenerationConfig | None = None

    @property
    def needs_conditioning(self) -> bool:
        """Whether the weights compute something else in a model without the conditioning (one step, r = 0)."""
        return self.conditioning is not None and "dual" in self.conditioning


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes the JSON into a folder."""
    saved = asdict(replace(manifest, usage=None))
    if manifest.usage is None:
        del saved["usage"]
    else:
        saved["usage"] = manifest.usage.to_dict()
    (folder / MANIFEST).write_text(json.dumps(saved, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """Reads a folder's JSON; None where there is none.

    Raises:
        ValueError: the file is damaged, of a later version, or has values that no export writes.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ArgumentError("", f"{path}", "a file that export wrote", f"one that cannot be read: {error}") from None
    require(isinstance(saved, dict), "", f"{path}", "a JSON object", repr(saved), verb="hold")
    version = saved.get("format")
    require(version == FORMAT, "", f"{path}", f"of format {FORMAT}", repr(version))
    names = [field.name for field in fields(Manifest) if field.name != "usage"]
    require(saved.keys() - {"usage"} == set(names), "", f"{path}", ", ".join(names), ", ".join(saved), verb="hold")
    known = {
        "conditioning": (None, *MODES), "kind": ("lora", "full"), "weights": ("student", "ema"), "layout": LAYOUTS,
    }  # fmt: skip
    for name, choices in known.items():
        require(saved[name] in choices, f"{path}", name, f"one of {', '.join(map(str, choices))}", repr(saved[name]))
    require(isinstance(saved["family"], str), f"{path}", "family", "a name", repr(saved["family"]))
    if "usage" in saved:
        try:
            saved["usage"] = GenerationConfig.from_dict(saved["usage"])
        except ArgumentError as error:
            raise error.renamed(function=f"{path}") from None
    return Manifest(**saved)


def write_conditioning(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes the tensors of a conditioned transformer's new submodules; nothing where it has none."""
    if tensors:
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(whole, folder / CONDITIONING, metadata={"format": "pt"})


def saved_conditioning(folder: Path, roots: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Name -> tensor of the conditioning saved in a folder: beside a LoRA, or among a model's own weights.

    Args:
        folder: an export, or a model.
        roots: top-level submodules that the family's conditioning may add (`FlowModel.conditioning_roots`).

    Raises:
        ValueError: a file is damaged.
    """
    beside = folder / CONDITIONING
    tensors: dict[str, torch.Tensor] = {}
    for path in [beside] if beside.exists() else sorted(folder.glob("*.safetensors")):
        tensors |= read_tensors(path, roots)
    return tensors


def read_tensors(path: Path, roots: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or those whose name begins with one of `roots`.

    Raises:
        ValueError: the file is missing or damaged.
    """
    with _opened(path) as file:
        names = [n for n in file.keys() if roots is None or n.partition(".")[0] in roots]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    return unmarked(tensors)


def marked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LoRA weights as a file holds them that only `attach` is to read."""
    first = min(name for name in tensors if name.endswith(".lora_A.weight"))
    value = tensors[first]
    return tensors | {first: torch.cat([value, value[:1]]), _MARK: value.new_zeros(1, 1)}


def unmarked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The LoRA weights of a file, marked or not."""
    marks = [name for name in tensors if name.endswith(_MARK)]
    if not marks:
        return tensors
    plain = {name: value for name, value in tensors.items() if name not in marks}
    first = min(name for name in plain if name.endswith(".lora_A.weight"))
    return plain | {first: plain[first][:-1].contiguous()}


def read_names(path: Path) -> set[str]:
    """The names of a safetensors file's tensors; raises ValueError where it is missing or damaged."""
    with _opened(path) as file:
        return set(file.keys())


def read_settings(path: Path) -> dict[str, Any] | None:
    """The adapter's configuration in a LoRA file, as diffusers writes it; None where there is none.

    Raises:
        ValueError: the file is missing or damaged.
    """
    with _opened(path) as file:
        written = (file.metadata() or {}).get(ADAPTER_SETTINGS)
    try:
        return None if written is None else dict(json.loads(written))
    except (ValueError, TypeError) as error:
        got = f"a damaged one: {error}"
        raise ArgumentError("", f"{path}", "an adapter's configuration", got, verb="hold") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ArgumentError("", f"{path}", "a whole safetensors file", error) from None


def inferred_mode(tensors: dict[str, torch.Tensor], folder: Path) -> str | None:
    """The mode of weights saved without a manifest.

    Raises:
        ValueError: a sign table alone, which `sign` and `midpoint+sign` share.
    """
    dual = any(name.partition(".")[0] != SIGN_TABLE for name in tensors)
    sign = any(name.partition(".")[0] == SIGN_TABLE for name in tensors)
    hint = "its sign table was trained as 'sign' or 'midpoint+sign'"
    require(dual or not sign, "load", "conditioning", f"given for {folder}", None, hint)
    return ("dual+sign" if sign else "dual") if dual else None


def put_conditioning(network: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copies saved tensors into a conditioned transformer.

    Raises:
        ArgumentError: names or shapes differ; nothing is then copied.
    """
    copy_tensors(where, "conditioning", conditioning_tensors(network), tensors)
