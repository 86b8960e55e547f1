"""`Draws`: every random number of a training step. Randomness lives here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from twinflow.errors import ArgumentError, ArgumentTypeError
from twinflow.objective.config import ROLES, TwinFlowConfig
from twinflow.sampling.grid import sampling_grid

# r lies at most this share of t below t for `mul` rows (docs/method.md, equation 4).
_MUL_SPAN = 0.05


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step of B rows; None where a step uses none.

    Args:
        roles: role name per row; None for `all_terms`.
        t, r: (B,) times on the CPU, float32 or float64, signed: `adv` rows have t = r < 0.
        z: (B, ...) noise.
        z_fake: (adv rows, ...) noise the fakes are generated from (`partition`).
        z_data: (B, ...) noise the data are generated from (data-free mode).
        z_rectify, t_rectify: noise and (CPU) times at which generated samples are noised again: the `e2e` rows only
            (`partition`) or all rows (`all_terms`).
    """

    roles: tuple[str, ...] | None
    t: torch.Tensor
    r: torch.Tensor
    z: torch.Tensor
    z_fake: torch.Tensor | None = None
    z_data: torch.Tensor | None = None
    z_rectify: torch.Tensor | None = None
    t_rectify: torch.Tensor | None = None

    def rows_of(self, role: str) -> tuple[int, ...]:
        """The rows with a role."""
        return _rows_of(tuple(self.roles or ()), role)

    def mask(self, role: str) -> np.ndarray:
        """(B,) booleans, read-only: which rows have a role; no rows for `all_terms`."""
        return _mask(tuple(self.roles or ()), role)


@lru_cache(maxsize=64)
def _rows_of(roles: tuple[str, ...], role: str) -> tuple[int, ...]:
    return tuple(row for row, name in enumerate(roles) if name == role)


@lru_cache(maxsize=64)
def _mask(roles: tuple[str, ...], role: str) -> np.ndarray:
    mask = np.array(roles, dtype=str) == role
    mask.setflags(write=False)
    return mask


def draw_step(
    config: TwinFlowConfig,
    latents: torch.Tensor,
    roles: Sequence[str] | None,
    generator: torch.Generator | None,
    position: int,
) -> Draws:
    """Draws the random numbers of a step.

    Times come from a CPU stream and noises from the latents' device, so that nothing waits for the device: given a
    CUDA generator, the times' stream is seeded from its initial seed and `position`; given a CPU generator and CUDA
    latents, the noises' stream is seeded from the CPU generator.

    Args:
        config: the objective's settings.
        latents: (B, ...), for shape, dtype and device.
        roles: role per row; None for `all_terms`.
        generator: the source, or None for torch's global streams.
        position: rows dealt so far, the number of this step in the stream.

    Returns:
        The draws; noises in float32, or wider where the latents are.
    """
    host, device = _streams(generator, latents.device, position)
    batch, dtype = latents.shape[0], torch.promote_types(latents.dtype, torch.float32)

    def noise(rows: int) -> torch.Tensor:
        return torch.randn((rows, *latents.shape[1:]), dtype=dtype, device=latents.device, generator=device)

    t, r = _times(config, batch, roles, host)
    rectify, fakes = (batch, 0) if roles is None else (list(roles).count(role) for role in ("e2e", "adv"))
    rectify = rectify if config.adversarial and config.rectify_weight > 0 else 0
    return Draws(
        roles=None if roles is None else tuple(roles),
        t=t,
        r=r,
        z=noise(batch),
        z_fake=noise(fakes) if fakes else None,
        z_data=noise(batch) if config.data_free else None,
        z_rectify=noise(rectify) if rectify else None,
        t_rectify=_uniform(rectify, host).float() if rectify else None,
    )


def _streams(
    generator: torch.Generator | None, device: torch.device, position: int
) -> tuple[torch.Generator | None, torch.Generator | None]:
    """The streams of times (CPU) and of noises (the latents' device)."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentTypeError("draw", "generator", "a torch.Generator or None", type(generator).__name__)
    if generator is None or generator.device.type == device.type == "cpu":
        return generator, generator
    if generator.device.type == "cpu":
        seed = int(torch.randint(2**62, (), generator=generator))
        return generator, torch.Generator(device).manual_seed(seed)
    if generator.device.type != device.type:
        raise ArgumentError("draw", "generator", f"on the CPU or the latents' device {device}", generator.device)
    # splitmix64 keeps the streams of neighbouring positions apart.
    mixed = (generator.initial_seed() + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    return torch.Generator().manual_seed((mixed ^ (mixed >> 27)) % 2**63), generator


def _uniform(count: int, generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _times(
    config: TwinFlowConfig, batch: int, roles: Sequence[str] | None, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Times t and r per row, float32 (docs/method.md, equation 4)."""
    t = _beta(config.time_dist, batch, generator)
    u = _uniform(batch, generator)
    if roles is None:
        r, focused = t - u * t, torch.arange(batch)
    else:
        names = np.array(roles, dtype=str)
        e2e, mul, any_time, one, adv = (torch.from_numpy(names == role) for role in ROLES)
        span = torch.where(mul, _MUL_SPAN * u * t, u * t)
        r = torch.where(adv, -t, torch.where(e2e | one, 0.0, t - span))
        t = torch.where(e2e, 1.0, torch.where(adv, -t, t))
        focused = any_time.nonzero()[:, 0]
    _focus(config, focused, t, r, generator)
    return t.float(), r.float()


def _beta(dist: tuple[float, float, float], count: int, generator: torch.Generator | None) -> torch.Tensor:
    """t ~ Beta(a, b) * scale in (0, scale], float64."""
    a, b, scale = dist
    if (a, b) == (1.0, 1.0):
        return (1.0 - _uniform(count, generator)) * scale
    x = torch._standard_gamma(torch.full((count,), a, dtype=torch.float64), generator=generator)
    y = torch._standard_gamma(torch.full((count,), b, dtype=torch.float64), generator=generator)
    return (x / (x + y).clamp_min(1e-300)).clamp(1e-12, 1.0) * scale


def _focus(
    config: TwinFlowConfig,
    rows: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor,
    generator: torch.Generator | None,
) -> None:
    """Moves a share of the rows, in place, onto the queries that sampling in `target_step_count` steps makes."""
    if config.step_focus == 0.0 or not len(rows):
        return
    grid = torch.tensor(sampling_grid(config.target_step_count), dtype=torch.float64)
    chosen, step, to_zero = _uniform(3 * len(rows), generator).view(3, -1)
    moved = chosen < config.step_focus
    start = (step[moved] * config.target_step_count).long()
    t[rows[moved]] = grid[start]
    r[rows[moved]] = torch.where(to_zero[moved] < 0.5, 0.0, grid[start + 1])


def check_draws(draws: Draws, config: TwinFlowConfig, latents: torch.Tensor, where: str = "TwinFlowLoss") -> None:
    """Raises TypeError or ValueError unless the draws fit the batch and the recipe."""
    batch = latents.shape[0]
    rectify = check_roles_and_times(draws, config, where, batch)
    noises = {"z": (draws.z, batch)}
    if adv := (draws.roles or ()).count("adv"):
        noises["z_fake"] = (draws.z_fake, adv)  # type: ignore[assignment]
    if config.data_free:
        noises["z_data"] = (draws.z_data, batch)  # type: ignore[assignment]
    if rectify:
        noises["z_rectify"] = (draws.z_rectify, rectify)  # type: ignore[assignment]
    for name, (value, rows) in noises.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise ArgumentTypeError(where, f"draws.{name}", "a floating tensor", _kind(value))
        if value.shape != (rows, *latents.shape[1:]):
            raise _error(where, name, f"of shape {(rows, *latents.shape[1:])}", tuple(value.shape))
        if value.device != latents.device:
            raise _error(where, name, f"on the latents' device {latents.device}", value.device)


def check_roles_and_times(draws: Draws, config: TwinFlowConfig, where: str, batch: int | None = None) -> int:
    """Raises TypeError or ValueError unless a plan can be made of the draws; returns the number of rectify rows."""
    if not isinstance(draws, Draws):
        raise ArgumentTypeError(where, "draws", "Draws or None", type(draws).__name__)
    if batch is None:
        batch = len(draws.t) if isinstance(draws.t, torch.Tensor) and draws.t.dim() else 1
    _check_roles(draws, config, batch, where)
    rectify = batch if draws.roles is None else draws.roles.count("e2e")
    rectify = rectify if config.adversarial and config.rectify_weight > 0 else 0
    t, r = (_checked_time(name, getattr(draws, name), batch, where) for name in ("t", "r"))
    if rectify:
        again = _checked_time("t_rectify", draws.t_rectify, rectify, where)
        if not ((again >= 0) & (again <= 1)).all():  # False for NaN too
            raise _error(where, "t_rectify", "in [0, 1]", again.tolist())
    _check_order(draws, t, r, where)
    return rectify


def _check_roles(draws: Draws, config: TwinFlowConfig, batch: int, where: str) -> None:
    if (draws.roles is None) != (config.recipe == "all_terms"):
        raise _error(where, "roles", "None for all_terms and given for partition", draws.roles)
    if not isinstance(draws.roles, (tuple, list, type(None))):
        raise ArgumentTypeError(where, "draws.roles", "a tuple of names or None", type(draws.roles).__name__)
    if draws.roles is not None and len(draws.roles) != batch:
        raise _error(where, "roles", f"{batch} names", len(draws.roles))
    for role in dict.fromkeys(draws.roles or ()):
        if role not in config.shares or (role == "adv" and not config.adversarial):
            raise _error(where, "roles", f"of {', '.join(config.shares)} (adv only where adversarial)", role)


def _checked_time(name: str, value: torch.Tensor | None, rows: int, where: str) -> np.ndarray:
    """The times as an array, of the right dtype and shape."""
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, torch.float64):
        raise ArgumentTypeError(where, f"draws.{name}", "a float32 or float64 tensor", _kind(value))
    if value.device.type != "cpu" or value.shape != (rows,):
        raise _error(where, name, f"a CPU tensor of shape ({rows},)", f"{tuple(value.shape)} on {value.device}")
    return value.detach().numpy()


def _check_order(draws: Draws, t: np.ndarray, r: np.ndarray, where: str) -> None:
    """|t| <= 1, and r lies between 0 and t; `adv` rows have t = r < 0, all others t >= 0."""
    adv = draws.mask("adv") if draws.roles else np.zeros(len(t), dtype=bool)
    ordered = np.where(adv, (r == t) & (t <= 0), (r <= t) & (r >= 0))  # False for NaN
    if (ordered & (np.abs(t) <= 1)).all():
        return
    for name, times in (("t", t), ("r", r)):
        if not (np.abs(times) <= 1).all():
            raise _error(where, name, "in [-1, 1]", times.tolist())
    row = int(np.flatnonzero(~ordered)[0])
    role = draws.roles[row] if draws.roles else "all"
    if t[row] != 0 and adv[row] != (t[row] < 0):
        raise _error(where, "t", "negative for adv rows and not for others", f"{t[row]} for row {row} ({role})")
    wanted = "t for adv rows" if role == "adv" else "between 0 and t"
    raise _error(where, "r", wanted, f"{r[row]} with t = {t[row]} for row {row} ({role})")


def _error(where: str, name: str, wanted: str, actual: object) -> ArgumentError:
    return ArgumentError(where, f"draws.{name}", wanted, actual)


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
