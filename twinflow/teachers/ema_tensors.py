"""The tensors of a running average: where they live, in which order of memory, and how they are restored."""

from collections.abc import Mapping

import torch


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a sharded tensor, in its memory; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x  # DTensor is not imported where it is not in use


def shadow_of(target: torch.Tensor, dtype: torch.dtype, device: torch.device | str | None) -> torch.Tensor:
    """Where the average of a tensor is kept: the tensor itself, or a copy in another dtype or place."""
    wanted = dtype
    if torch.promote_types(target.dtype, dtype) == target.dtype and dtype == torch.float32:
        wanted = target.dtype
    place = target.device if device is None else torch.device(device)
    if hasattr(target, "to_local"):
        if place.type != target.device.type:
            raise ValueError(
                "EMATeacher: device must be None where the student is sharded, as an average lies beside its "
                f"parameter's shards, got {device}"
            )
        place = target.device
    if wanted == target.dtype and place == target.device:
        return target.detach()
    shadow = target.detach().to(device=place, dtype=wanted, copy=True)
    return shadow.pin_memory() if place.type == "cpu" and target.device.type == "cuda" else shadow


def flat(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The elements in the memory order of `like`, so that dense layouts such as channels_last need no copy."""
    if like.is_contiguous():
        return x
    if x.stride() != like.stride():
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((x.numel(),), (1,))


def load_tensors(where: str, mine: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Copies saved tensors in place; ValueError, and nothing copied, where names or shapes differ."""
    if set(mine) != set(saved):
        changed = sorted(set(mine) ^ set(saved))
        raise ValueError(f"{where}: the state's parameters must be the teacher's, got a difference in {changed[:3]}")
    for name, value in mine.items():
        if value.shape != saved[name].shape:
            raise ValueError(
                f"{where}: {name} must be of shape {tuple(value.shape)}, got {tuple(saved[name].shape)} in the state"
            )
    for name, value in mine.items():
        value.copy_(saved[name])
