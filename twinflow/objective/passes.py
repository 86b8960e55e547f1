"""`NetworkCall`, `Plan`, `PlanOptions`: what a step's plan is made of, and what it is asked with."""

from dataclasses import dataclass, field

from twinflow.objective.rows import Rows

SCHEDULES = ("planned", "published")
TARGET_CALLS = ("fake", "data", "cfg", "rollout")  # what the regression targets are made of


@dataclass(frozen=True)
class NetworkCall:
    """One network call.

    Args:
        name: the method of the step that runs it: `fake`, `data`, `cfg`, `rollout`, `student`, `velocity`, `generate`,
            `fake_velocity`, `rectify`.
        who: `student` or `teacher`.
        rows: the batch row of each entry; a row may stand twice (cond and uncond, or two branches).
        kinds: per entry: `cond` or `uncond` (`cfg`), `fake` or `real` (`rectify`), `main` or `generated` (`rollout`).
        t, r: signed times per entry.
        gradient: whether the call is differentiated.
        micro_batch: which part of the step it belongs to; the loss of a micro-batch follows its last call.
        segment: number of the Euler segment, from 0 (`rollout`).
        discarded: True for a call that only keeps ranks in step; its result is dropped.
    """

    name: str
    who: str
    rows: Rows
    kinds: tuple[str, ...]
    t: tuple[float, ...]
    r: tuple[float, ...]
    gradient: bool = False
    micro_batch: int = 0
    segment: int = 0
    discarded: bool = False


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

    @property
    def rows_without_gradient(self) -> int:
        """Network rows executed without gradient."""
        return sum(len(p.rows) for p in self.calls if not p.gradient)

    @property
    def rows_with_gradient(self) -> int:
        """Network rows executed with gradient."""
        return sum(len(p.rows) for p in self.calls if p.gradient)

    def __str__(self) -> str:
        head = f"{'call':<14} {'who':<8} {'gradient':<9} {'micro-batch':>5} {'rows':>5}  queries (row: t -> r)"
        lines = [f"step of {self.batch} rows, recipe {self.recipe}, order {self.order}, {self.schedule} schedule", head]
        for p in self.calls:
            entries = zip(p.rows, p.kinds, p.t, p.r, strict=True)
            marks = {"uncond": "u", "real": "+", "fake": "-", "generated": "g"}
            shown = [f"{row}{marks.get(kind, '')}: {t:.3g} -> {r:.3g}" for row, kind, t, r in entries]
            text = ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")
            name = p.name + (f" {p.segment + 1}" if p.name == "rollout" else "")
            grad = "yes" if p.gradient else "-"
            lines.append(f"{name:<14} {p.who:<8} {grad:<9} {p.micro_batch:>5} {len(p.rows):>5}  {text}")
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
        micro_batch: most rows of a micro-batch, and of a call; None: the whole batch in one micro-batch.
        keep: calls that get one discarded row where they have none, so that ranks which share collectives run the same
            calls: `none`, `student` (the differentiated ones) or `all`.

    Raises:
        ValueError: an unknown schedule.
    """

    cfg_by: str = "teacher"
    rollout_by: str = "teacher"
    has_uncond: bool = True
    merge: bool = True
    schedule: str = "planned"
    micro_batch: int | None = None
    keep: str = "none"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"TwinFlowLoss: schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
