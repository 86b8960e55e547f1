"""`dual_time_embedding`: what a network is told about t, r and the sign of the trajectory.

    out = embed_t(features(t)) + embed_r(features(r)) (t - r) + sign_table[t < 0]     (docs/method.md, 29 and 30)

With a sign table |t| and |r| stand for t and r everywhere but in the choice of the row. Two operations, one launch
each: time_features.py before the embedders, combine_time_embeddings.py after them.
"""

from collections.abc import Callable

import torch

# Imported for what they register.
from twinflow_kernels import combine_time_embeddings, time_features  # noqa: F401
from twinflow_kernels._registry import require, require_floating, require_like, require_rows

TIME_DTYPES = (torch.float32, torch.float64)


def _check(
    t: torch.Tensor, r: torch.Tensor, sign_table: torch.Tensor | None, num_channels: int, downscale_freq_shift: float
) -> None:
    where = "dual_time_embedding"
    require_floating(where, "t", t, TIME_DTYPES)
    require_floating(where, "r", r, (t.dtype,))
    require(t.dim() == 1, where, "t", "of shape (B,)", tuple(t.shape))
    require_rows(where, "r", r, t)
    for name, time in (("t", t), ("r", r)):
        require(not time.requires_grad, where, name, "a tensor without requires_grad", "requires_grad=True")
        if time.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = time[~(time.abs() <= 1)]
            require(wrong.numel() == 0, where, name, "within [-1, 1]", wrong[:1].tolist())
    if not isinstance(num_channels, int):
        raise TypeError(f"{where}: num_channels must be an int, got {type(num_channels).__name__}")
    require(num_channels >= 2, where, "num_channels", "at least 2", num_channels)
    wanted = f"less than num_channels // 2 = {num_channels // 2}"
    require(downscale_freq_shift < num_channels // 2, where, "downscale_freq_shift", wanted, downscale_freq_shift)
    if sign_table is not None:
        require_floating(where, "sign_table", sign_table)
        is_table = sign_table.dim() == 2 and sign_table.shape[0] == 2
        require(is_table, where, "sign_table", "of shape (2, D)", tuple(sign_table.shape))
        require(sign_table.device == t.device, where, "sign_table", f"on device {t.device}", sign_table.device)


def _check_embeddings(
    emb_t: torch.Tensor, emb_r: torch.Tensor | None, t: torch.Tensor, sign_table: torch.Tensor | None
) -> None:
    where = "dual_time_embedding"
    name = "embed_t's output"
    require_floating(where, name, emb_t)
    is_batch = emb_t.dim() == 2 and emb_t.shape[0] == t.shape[0]
    require(is_batch, where, name, f"of shape ({t.shape[0]}, D)", tuple(emb_t.shape))
    require(emb_t.device == t.device, where, name, f"on device {t.device}", emb_t.device)
    if emb_r is not None:
        require_floating(where, "embed_r's output", emb_r)
        require_like(where, "embed_r's output", emb_r, name, emb_t)
    if sign_table is not None:
        wanted = f"of shape (2, {emb_t.shape[1]})"
        require(sign_table.shape[1] == emb_t.shape[1], where, "sign_table", wanted, tuple(sign_table.shape))


def dual_time_embedding(
    t: torch.Tensor,
    r: torch.Tensor,
    sign_table: torch.Tensor | None,
    embed_t: Callable[[torch.Tensor], torch.Tensor],
    embed_r: Callable[[torch.Tensor], torch.Tensor] | None,
    *,
    num_channels: int,
    flip_sin_to_cos: bool = True,
    downscale_freq_shift: float = 0.0,
    scale: float = 1.0,
) -> torch.Tensor:
    """Embeds the pair of times (t, r), and the sign of t; autograd to both embeddings and the table.

    Args:
        t, r: signed times, (B,), float32 or float64, in [-1, 1]; without requires_grad.
        sign_table: (2, D), any floating dtype, row 0 for t >= 0 (-0.0 among them), row 1 for t < 0; the embedders
            then get |t| and |r|. None: no sign term, and the embedders get the signed times.
        embed_t, embed_r: features (B, num_channels), in the times' dtype -> (B, D); any cast is theirs. embed_r None:
            no second term.
        num_channels, flip_sin_to_cos, downscale_freq_shift, scale: of the features, as in diffusers' `Timesteps`.

    Returns:
        embed_t(t) + embed_r(r) (t - r) + sign_table[t < 0], (B, D), in the dtype of embed_t's output; added up in
        float32 or wider.

    Raises:
        TypeError: a time, table or embedding is not a floating tensor of an allowed dtype.
        ValueError: shapes or devices differ, times require grad or (on the CPU, where looking costs no sync) leave
            [-1, 1], or num_channels and downscale_freq_shift leave no frequency.

    Source: TwinFlow (arXiv 2512.05150); docs/method.md, equations 29 and 30.
    """
    _check(t, r, sign_table, num_channels, downscale_freq_shift)
    features = torch.ops.twinflow.time_features(
        t, None if embed_r is None else r, sign_table is not None, num_channels, flip_sin_to_cos,
        float(downscale_freq_shift), float(scale),
    )  # fmt: skip
    emb_t = embed_t(features[0])
    emb_r = None if embed_r is None else embed_r(features[1])
    _check_embeddings(emb_t, emb_r, t, sign_table)
    if emb_r is None and sign_table is None:
        return emb_t
    return torch.ops.twinflow.combine_time_embeddings(emb_t, emb_r, t, None if emb_r is None else r, sign_table)
