"""`make_plan()`: draws -> the ordered network calls of a step. Pure, on the host, without a model.

The `published` schedule runs the calls of the published code: every row of every teacher call, one kind of query per
call. The `planned` schedule runs the rows that count (docs/method.md, section 4): all work without gradient first,
then the student.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from twinflow.errors import ArgumentError
from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.draws import Draws
from twinflow.objective.rows import Rows

SCHEDULES = ("planned", "published")
TARGET_CALLS = ("fake", "data", "cfg", "rollout")  # what the regression targets are made of
_LEGEND = "(u unconditional, - fake, + real, g generated)"
_MARKS = {"uncond": "u", "real": "+", "fake": "-", "generated": "g"}


class NetworkCall(NamedTuple):
    """One network call.

    Args:
        name: the method of the step that runs it: `fake`, `data`, `cfg`, `rollout`, `student`, `velocity`, `generate`,
            `fake_velocity`, `rectify`.
        who: `student` or `teacher`.
        rows: the batch row of each entry; a row may stand twice (cond and uncond, or two branches).
        parts: what the entries are, in order, as (kind, number of entries): `cond` and `uncond` (`cfg`), `fake` and
            `real` (`rectify`), `main` and `generated` (`rollout`), `main` elsewhere.
        t, r: signed times per entry.
        gradient: whether the call is differentiated.
        micro_batch: number of the micro-batch that it belongs to, whose loss follows its last call.
        segment: number of the Euler segment, from 0 (`rollout`).
        discarded: True for a call that only keeps ranks in step; its result is dropped.
    """

    name: str
    who: str
    rows: Rows
    parts: tuple[tuple[str, int], ...]
    t: tuple[float, ...]
    r: tuple[float, ...]
    gradient: bool = False
    micro_batch: int = 0
    segment: int = 0
    discarded: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each entry."""
        return tuple(kind for kind, entries in self.parts for _ in range(entries))


@dataclass(frozen=True)
class Plan:
    """The ordered calls of a step of `batch` rows, and `str()` that shows them beside the published row count."""

    calls: tuple[NetworkCall, ...]
    micro_batches: tuple[Rows, ...]
    batch: int
    schedule: str
    recipe: str
    order: int
    enhanced: frozenset[int]
    rollout_rows: frozenset[int]
    published_rows: int = field(repr=False)
    times: np.ndarray = field(repr=False, compare=False)  # (3, entries): t, r, t - r of all calls' entries in order

    @property
    def rows_without_gradient(self) -> int:
        """Network rows executed without gradient."""
        return sum(len(call.rows) for call in self.calls if not call.gradient)

    @property
    def rows_with_gradient(self) -> int:
        """Network rows executed with gradient."""
        return sum(len(call.rows) for call in self.calls if call.gradient)

    def __str__(self) -> str:
        head = (
            f"{'call':<14} {'who':<8} {'gradient':<9} {'micro-batch':>11} {'rows':>5}  entries, row: t -> r {_LEGEND}"
        )
        lines = [f"step of {self.batch} rows, recipe {self.recipe}, order {self.order}, {self.schedule} schedule", head]
        for call in self.calls:
            entries = zip(call.rows, call.kinds, call.t, call.r, strict=True)
            shown = [f"{row}{_MARKS.get(kind, '')}: {t:.3g} -> {r:.3g}" for row, kind, t, r in entries]
            text = ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")
            name = call.name + (f" {call.segment + 1}" if call.name == "rollout" else "")
            gradient = "yes" if call.gradient else "-"
            numbers = f"{call.micro_batch:>11} {len(call.rows):>5}"
            lines.append(f"{name:<14} {call.who:<8} {gradient:<9} {numbers}  {text}")
        lines.append(
            f"rows without gradient: {self.rows_without_gradient} (published schedule: {self.published_rows}); "
            f"rows with gradient: {self.rows_with_gradient}"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class PlanOptions:
    """What besides config and draws decides a plan.

    Args:
        cfg_by, rollout_by: who answers guidance queries and rollouts: `teacher` or `student`.
        has_uncond: whether there is an unconditional condition.
        merge: whether cond and uncond can be one call.
        schedule: `planned` or `published`.
        micro_batch: most rows of a micro-batch, and of a call; None: the whole batch is one.
        pad_calls: calls that get one discarded row where they have none, so that ranks which share collectives run the
            same calls: `none`, `student` (the differentiated ones) or `all`.

    Raises:
        ValueError: an unknown schedule.
    """

    cfg_by: str = "teacher"
    rollout_by: str = "teacher"
    has_uncond: bool = True
    merge: bool = True
    schedule: str = "planned"
    micro_batch: int | None = None
    pad_calls: str = "none"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ArgumentError("TwinFlowLoss", "schedule", f"one of {', '.join(SCHEDULES)}", repr(self.schedule))


class _Entries(NamedTuple):
    """Entries of one kind of a call: rows and signed times, as arrays."""

    kind: str
    rows: np.ndarray
    t: np.ndarray
    r: np.ndarray


class _Planner:
    """Builds the calls of one step from masks over its rows."""

    def __init__(self, config: TwinFlowConfig, draws: Draws, options: PlanOptions) -> None:
        self.config, self.draws, self.options = config, draws, options
        self.published = options.schedule == "published"
        self.t, self.r = (times.numpy().astype(np.float64) for times in (draws.t, draws.r))
        self.batch = len(self.t)
        self.all_terms = draws.roles is None
        nothing, everything = np.zeros(self.batch, dtype=bool), np.ones(self.batch, dtype=bool)
        self.everything = everything
        self.adv = nothing if self.all_terms else draws.mask("adv")
        e2e = everything if self.all_terms else draws.mask("e2e")
        order, size = config.estimate_order, np.abs(self.t)
        low, high = config.enhanced_range
        # A row counts where it has a main loss (docs/method.md, equation 16).
        counted = everything
        if order == 0 and not self.all_terms:
            counted = self.adv | draws.mask("mul")
        self.guided = config.enhanced_ratio > 0 and options.has_uncond
        within = (low < size) & (size <= high if self.all_terms else size < high)
        self.enhanced = within & ~self.adv & counted if self.guided else nothing
        self.rolled = ~self.adv & (self.t - config.delta_t > self.r) if order > 0 else nothing
        self.rectified = e2e if config.adversarial and config.rectify_weight > 0 else nothing
        self.run = everything if self.published else counted | self.rectified  # by the student, with gradient
        self.calls: list[NetworkCall] = []
        self.times: list[tuple[np.ndarray, np.ndarray]] = []  # t and r of each call

    def rows(self, mask: np.ndarray, micro_batch: int) -> np.ndarray:
        """The rows of a micro-batch where a mask holds."""
        if len(self.bounds) == 1:
            return mask.nonzero()[0]  # np.flatnonzero costs three times as much
        first, last = self.bounds[micro_batch]
        return mask[first:last].nonzero()[0] + first

    def entries(self, kind: str, rows: np.ndarray, t: Any = None, r: Any = None) -> _Entries:
        """Entries for some rows, at their own times unless others are given."""
        if isinstance(t, float):
            t, r = np.full(len(rows), t), np.full(len(rows), r)
        return _Entries(kind, rows, self.t[rows] if t is None else t, self.r[rows] if r is None else r)

    def add(self, name: str, who: str, parts: list[_Entries], micro_batch: int, **more: Any) -> None:
        """Appends a call; none without entries, unless ranks must keep step."""
        if not any(len(part.rows) for part in parts):
            pad = self.options.pad_calls
            if pad == "none" or (pad == "student" and not more.get("gradient")):
                return
            parts = [self.entries("main", np.array([self.bounds[micro_batch][0]]))]
            more["discarded"] = True
        kind, rows, t, r = parts[0]
        kinds: tuple[tuple[str, int], ...] = ((kind, len(rows)),)
        if len(parts) > 1:
            parts = [part for part in parts if len(part.rows)]
            _, *columns = zip(*parts, strict=True)
            rows, t, r = map(np.concatenate, columns)
            kinds = tuple([(part.kind, len(part.rows)) for part in parts])
        self.times.append((t, r))
        tuples = (tuple(rows.tolist()), kinds, tuple(t.tolist()), tuple(r.tolist()))
        self.calls.append(NetworkCall(name, who, *tuples, micro_batch=micro_batch, **more))

    def add_pair(self, name: str, who: str, pair: list[_Entries], micro_batch: int, merge: bool) -> None:
        """Appends two kinds of query as one call, or as two where they cannot be or must not be one."""
        for parts in [pair] if merge and self.fits(pair) else [[part] for part in pair]:
            self.add(name, who, parts, micro_batch)

    def fits(self, parts: list[_Entries]) -> bool:
        """Whether different kinds of query may be one call; ranks that share collectives decide alike."""
        most = self.options.micro_batch
        rows = sum(len(part.rows) for part in parts)
        return not self.published and (most is None or (rows <= most and self.options.pad_calls != "all"))

    def samples(self, micro_batch: int) -> None:
        """One-step samples: fake data of the adv rows, and all other data in data-free mode (equations 5, 9)."""
        if self.config.adversarial and not self.all_terms and self.config.shares["adv"] > 0:
            fakes = self.entries("main", self.rows(self.adv, micro_batch), 1.0, 0.0)
            self.add("fake", "student", [fakes], micro_batch)
        if self.config.data_free:
            data = self.entries("main", self.rows(~self.adv, micro_batch), 1.0, 0.0)
            self.add("data", "student", [data], micro_batch)

    def guidance(self, micro_batch: int) -> None:
        """Teacher queries of the enhanced target (equation 8)."""
        if not self.guided:
            return
        rows = self.rows(self.everything if self.published else self.enhanced, micro_batch)
        pair = [self.entries(kind, rows, self.t[rows], self.t[rows]) for kind in ("cond", "uncond")]
        self.add_pair("cfg", self.options.cfg_by, pair, micro_batch, self.options.merge)

    def rollouts(self, micro_batch: int) -> None:
        """Teacher rollouts (equations 10 to 12): N equal Euler segments from max(t - delta, r) down to r."""
        order = self.config.estimate_order
        if order == 0:
            return
        parts = [self.entries("main", self.rows(self.everything if self.published else self.rolled, micro_batch))]
        if self.all_terms and self.config.adversarial and self.config.consistency_weight > 0:
            parts.append(self.entries("generated", self.rows(self.everything, micro_batch), 1.0, 0.0))
        for group in [parts] if self.fits(parts) else [[part] for part in parts]:
            points = [self.points(part) for part in group]
            for k in range(order):
                segments = [_Entries(p.kind, p.rows, x[k], x[k + 1]) for p, x in zip(group, points, strict=True)]
                self.add("rollout", self.options.rollout_by, segments, micro_batch, segment=k)

    def points(self, part: _Entries) -> list[np.ndarray]:
        """The times that N equal segments from max(t - delta, r) to r lie between; the last is exactly r."""
        order, r = self.config.estimate_order, part.r
        start = np.maximum(part.t - self.config.delta_t, r)
        return [start, *(start + (r - start) * k / order for k in range(1, order)), r]

    def student(self, micro_batch: int) -> None:
        """The differentiated calls."""
        config, rows = self.config, self.rows(self.run, micro_batch)

        def add(name: str, *times: Any) -> None:
            self.add(name, "student", [self.entries("main", rows, *times)], micro_batch, gradient=True)

        if not self.all_terms or config.estimate_order > 0:
            add("student")
        if not self.all_terms:
            return
        if config.real_velocity_weight > 0:
            add("velocity", self.t[rows], self.t[rows])
        if needs_generation(config):
            add("generate", 1.0, 0.0)
        if config.adversarial and config.adversarial_weight > 0:
            add("fake_velocity", -self.t[rows], -self.t[rows])

    def rectify(self, micro_batch: int) -> None:
        """Fake against real velocity of generated samples, by the student (equation 21)."""
        if not (self.config.adversarial and self.config.rectify_weight > 0):
            return
        if not self.all_terms and self.config.shares["e2e"] == 0:
            return
        rows = self.rows(self.rectified, micro_batch)
        again = np.zeros(self.batch)
        if self.draws.t_rectify is not None:
            again[self.rectified] = self.draws.t_rectify.double().numpy()
        pair = [self.entries(kind, rows, sign * again[rows], sign * again[rows]) for kind, sign in _RECTIFY]
        self.add_pair("rectify", "student", pair, micro_batch, merge=True)

    def published_rows(self) -> int:
        """Rows without gradient of the published schedule: it drops none of a call's rows."""
        config = self.config
        fakes = int(np.count_nonzero(self.adv))
        data = self.batch - fakes if config.data_free else 0
        guidance = 2 * self.batch if self.guided else 0
        rollouts = 2 if self.all_terms and config.adversarial and config.consistency_weight > 0 else 1
        rectified = int(np.count_nonzero(self.rectified))
        return fakes + data + guidance + rollouts * config.estimate_order * self.batch + 2 * rectified

    def build(self) -> Plan:
        most = self.options.micro_batch or self.batch
        self.bounds = [(first, min(first + most, self.batch)) for first in range(0, self.batch, most)]
        numbers = range(len(self.bounds))
        for phase in (self.samples, *([self.student] if self.published else []), self.guidance, self.rollouts):
            for micro_batch in numbers:
                phase(micro_batch)
        for micro_batch in numbers:
            if not self.published:
                self.student(micro_batch)
            self.rectify(micro_batch)
        t, r = (np.concatenate(times) for times in zip(*self.times, strict=True)) if self.times else np.zeros((2, 0))
        return Plan(
            calls=tuple(self.calls),
            micro_batches=tuple(tuple(range(*bounds)) for bounds in self.bounds),
            batch=self.batch,
            schedule=self.options.schedule,
            recipe=self.config.recipe,
            order=self.config.estimate_order,
            enhanced=frozenset(self.enhanced.nonzero()[0].tolist()),
            rollout_rows=frozenset(self.rolled.nonzero()[0].tolist()),
            published_rows=self.published_rows(),
            times=np.stack([t, r, t - r]),
        )


_RECTIFY = (("fake", -1.0), ("real", 1.0))


def needs_generation(config: TwinFlowConfig) -> bool:
    """Whether `all_terms` generates one-step samples with gradient (equation 26)."""
    consistency = config.consistency_weight > 0 and config.estimate_order > 0
    return config.adversarial and (config.adversarial_weight > 0 or config.rectify_weight > 0 or consistency)


def make_plan(config: TwinFlowConfig, draws: Draws, options: PlanOptions | None = None) -> Plan:
    """Plans a step.

    Args:
        config: the objective's settings.
        draws: the step's random numbers; only roles and times matter.
        options: who answers, which schedule, how many rows a call; None: the defaults.

    Returns:
        The plan.
    """
    return _Planner(config, draws, options or PlanOptions()).build()
