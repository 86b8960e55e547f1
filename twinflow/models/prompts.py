"""`prompt_groups()`: rows whose prompts have one length, so that no attention mask is ever needed.

A mask over text tokens rules out flash attention and costs a dense matrix per sample. Trimming the padding of rows of
equal length gives the same attention without one.
"""

from typing import Any

import torch

from twinflow.errors import ArgumentError

Groups = list[tuple[list[int], int]]


def prompt_groups(lengths: list[int], multiple: int = 1) -> Groups:
    """The batch's rows by prompt length.

    Args:
        lengths: tokens of each row's prompt.
        multiple: lengths that round up to the same multiple go together.

    Returns:
        (rows, tokens) of each group, in order of first rows; `tokens` covers the longest prompt of the group.
    """
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(-(-length // multiple), []).append(row)
    return [(rows, max(lengths[row] for row in rows)) for rows in groups.values()]


def host_lengths(mask: torch.Tensor) -> torch.Tensor:
    """(B, L) mask of valid tokens, which come first -> (B,) int64 lengths on the CPU; waits for the device.

    Raises:
        ValueError: a row without valid tokens, or whose valid tokens do not come first.
    """
    mask = mask.bool().cpu()
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(mask.shape[1])[None] < lengths[:, None]):
        bad = [row for row, n in enumerate(lengths.tolist()) if not mask[row, :n].all()]
        raise ArgumentError("prompt_mask", "valid tokens", "first", f"gaps in rows {bad}", verb="come")
    return lengths


def prompt_lengths(cond: dict[str, torch.Tensor]) -> list[int]:
    """The number of valid tokens of each row's prompt.

    Args:
        cond: `prompt_embeds` (B, L, D), and `prompt_lengths` (B,) integers on the CPU, or `prompt_mask` (B, L) of 1 for
            the valid tokens, which come first (reading it waits for its device); with neither every token is valid.

    Raises:
        ValueError: lengths outside 1 .. L, or a mask whose valid tokens do not come first.
    """
    batch, longest = cond["prompt_embeds"].shape[:2]
    given = cond.get("prompt_lengths")
    if given is None:
        mask = cond.get("prompt_mask")
        if mask is None:
            return [longest] * batch
        if mask.shape != (batch, longest):
            raise ArgumentError("", "prompt_mask", f"of shape {(batch, longest)}", tuple(mask.shape))
        given = host_lengths(mask)
    if given.shape != (batch,) or given.is_floating_point() or given.dtype == torch.bool:
        got = f"{given.dtype} of shape {tuple(given.shape)}"
        raise ArgumentError("", "prompt_lengths", f"{batch} integers", got)
    lengths: list[int] = given.tolist()
    bad = [n for n in lengths if not 1 <= n <= longest]
    if bad:
        raise ArgumentError("", "prompt_lengths", f"in 1 .. {longest}", bad[0])
    return lengths


def row_index(rows: list[int], device: torch.device) -> torch.Tensor:
    """Rows as an int64 tensor on a device, without waiting for it."""
    return torch.tensor(rows).to(device, non_blocking=True)


def trim(cond: dict[str, Any], rows: list[int], tokens: int) -> dict[str, Any]:
    """The condition of some rows with `tokens` prompt tokens and without a mask."""
    batch = cond["prompt_embeds"].shape[0]
    chosen = {}
    for name, leaf in cond.items():
        if name in ("prompt_mask", "prompt_lengths"):
            continue
        part = leaf if len(rows) == batch else leaf.index_select(0, row_index(rows, leaf.device))
        chosen[name] = part[:, :tokens] if name == "prompt_embeds" else part
    return chosen
