"""`Evaluation`: the loss on images that are held out, at the same draws every time."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch

from twinflow.distributed import calls_in_lockstep, gather_bytes, world
from twinflow.errors import require
from twinflow.interface import Student, Teacher
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.draws import Draws, draw_step
from twinflow.objective.loss import TwinFlowLoss, TwinFlowOutput
from twinflow.objective.roles import RoleCounter
from twinflow.train.data.cache import Cache, Entry, on_device
from twinflow.train.validation.eval_mode import eval_mode

MOST_ROWS = 64
_ON_HOST = ("t", "r", "t_rectify")  # of draws


class Evaluation:
    """The validation loss of a run: a step over all rows together, row by row, without gradient.

    Each row has the role, the times and the noise of its place, from the seed alone, so that the losses of a run are
    comparable with each other, on any device, for any batch and number of ranks. Neither the run's random streams nor
    its teacher and role counter move.

    Args:
        entries: held out; of more than 64 those with the lowest content hashes are used.
        autocast: makes the context of the student's calls.

    Raises:
        ValueError: no entries.
    """

    def __init__(
        self,
        config: TwinFlowConfig,
        cache: Cache,
        entries: Sequence[Entry],
        *,
        device: torch.device,
        seed: int = 0,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        wanted, hint = "something to evaluate on", "raise eval_share"
        require(entries, "Evaluation", "entries", wanted, "none", hint, "hold")
        self._config, self._cache, self._device, self._seed, self._autocast = config, cache, device, seed, autocast
        self._entries = sorted(entries, key=lambda entry: (entry.content, entry.name))[:MOST_ROWS]
        partition = config.recipe == "partition"
        self._roles = RoleCounter(config.active_shares()).peek(len(self)) if partition else None

    def __len__(self) -> int:
        return len(self._entries)

    def run(self, student: Student, teacher: Teacher | None) -> dict[str, Any]:
        """Evaluates; every rank must call it, and all get the same.

        Ranks with a whole model each share the rows; where the model is sharded each evaluates all of them, as all must
        make the same calls.

        Args:
            student: wrapped or not.

        Returns:
            `loss`, a float, and `terms`, name -> float, which sum to it.
        """
        rank, ranks = world()
        together = ranks == 1 or calls_in_lockstep(student) == "all"
        rows = range(len(self)) if together else range(rank, len(self), ranks)
        with eval_mode(student, self._device) as plain, self._autocast():
            outs = [self._row(plain, teacher, row) for row in rows]
        found = [(float(out.loss), {name: float(value) for name, value in out.terms.items()}) for out in outs]
        parts: list[Any] = [found] if together else [json.loads(x) for x in gather_bytes(json.dumps(found).encode())]
        every = [row for part in parts for row in part]
        names = sorted({name for _, terms in every for name in terms})
        terms = {name: _sum(terms.get(name, 0.0) for _, terms in every) for name in names}
        return {"loss": _sum(loss for loss, _ in every), "terms": terms}

    def _row(self, student: Student, teacher: Teacher | None, row: int) -> TwinFlowOutput:
        entry = self._entries[row]
        latents = self._cache.latents([entry]).float()
        roles = None if self._roles is None else self._roles[row : row + 1]
        draws = draw_step(self._config, latents, roles, torch.Generator().manual_seed(self._seed + row), row)
        conditions = self._cache.condition([entry]), self._cache.uncond_at(entry.size)
        cond, uncond = (on_device(found, self._device) for found in conditions)
        latents, draws = latents.to(self._device), self._moved(draws)
        how: dict[str, Any] = {"teacher": teacher, "draws": draws, "step_rows": len(self)}
        return TwinFlowLoss(self._config).evaluate(student, latents, cond, uncond, **how)

    def _moved(self, draws: Draws) -> Draws:
        noises = {f.name: getattr(draws, f.name) for f in fields(draws) if f.name not in ("roles", *_ON_HOST)}
        return replace(draws, **{name: z.to(self._device) for name, z in noises.items() if z is not None})


def _sum(values: Any) -> float:
    """The exact sum, rounded once: the same in any order."""
    listed = list(values)
    return math.fsum(listed) if all(map(math.isfinite, listed)) else math.nan
