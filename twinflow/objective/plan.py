"""`make_plan()`: draws -> the ordered network calls of a step. Pure, on the host, without a model.

The `published` schedule runs the calls of the published code: every row of every teacher pass, one kind of query per
call. The `planned` schedule runs the rows that count (docs/method.md, section 4): all work without gradient first,
then the student.
"""

from collections.abc import Sequence
from typing import Any

import torch

from twinflow.objective.config import TwinFlowConfig
from twinflow.objective.draws import Draws
from twinflow.objective.passes import NetworkCall, Plan, PlanOptions
from twinflow.objective.rows import Rows

Entry = tuple[int, str, float, float]  # row, kind, t, r


class _Planner:
    """Builds the passes of one step."""

    def __init__(self, config: TwinFlowConfig, draws: Draws, request: PlanOptions) -> None:
        self.config, self.draws, self.request = config, draws, request
        self.published = request.schedule == "published"
        self.t, self.r = draws.t.double().tolist(), draws.r.double().tolist()
        self.batch = len(self.t)
        self.roles = draws.roles or ("all",) * self.batch
        self.calls: list[NetworkCall] = []
        low, high = config.enhanced_range
        guided = config.enhanced_ratio > 0 and request.has_uncond
        self.enhanced = frozenset(
            i
            for i in range(self.batch)
            if guided and self.roles[i] != "adv" and self.counted(i)
            and (low < abs(self.t[i]) < high or (self.roles[i] == "all" and abs(self.t[i]) == high))
        )  # fmt: skip
        self.rollout = frozenset(
            i
            for i in range(self.batch)
            if config.estimate_order > 0 and self.roles[i] != "adv" and self.t[i] - config.delta_t > self.r[i]
        )
        self.rectified = {row: k for k, row in enumerate(self._rectify_rows())}

    def _rectify_rows(self) -> Rows:
        if not (self.config.adversarial and self.config.rectify_weight > 0):
            return ()
        return tuple(i for i in range(self.batch) if self.roles[i] in ("e2e", "all"))

    def counted(self, row: int) -> bool:
        """Whether the row has a main loss (docs/method.md, equation 16)."""
        return self.config.estimate_order > 0 or self.roles[row] in ("mul", "adv", "all")

    def student_rows(self, rows: Sequence[int]) -> Rows:
        """The rows of a micro-batch that the student runs with gradient."""
        return tuple(i for i in rows if self.published or self.counted(i) or i in self.rectified)

    def add(self, name: str, who: str, entries: list[Entry], micro_batch: int, **more: Any) -> None:
        """Appends a call for (row, kind, t, r) entries; none for no entries, unless ranks must keep step."""
        if not entries:
            if self.request.keep == "none" or (self.request.keep == "student" and not more.get("gradient")):
                return
            row = self.micro_batches[micro_batch][0]
            entries, more = [(row, "main", self.t[row], self.r[row])], {**more, "discarded": True}
        rows, kinds, t, r = zip(*entries, strict=True)
        self.calls.append(NetworkCall(name, who, rows, kinds, t, r, micro_batch=micro_batch, **more))

    def add_pair(self, name: str, who: str, a: list[Entry], b: list[Entry], micro_batch: int, merge: bool) -> None:
        """Appends two kinds of query as one call, or as two where they cannot be or must not be one."""
        for entries in [a + b] if merge and self.fits(len(a) + len(b)) else [a, b]:
            self.add(name, who, entries, micro_batch)

    def fits(self, rows: int) -> bool:
        """Whether different kinds of query may be one call; ranks that share collectives decide alike."""
        most = self.request.micro_batch
        return not self.published and (most is None or (rows <= most and self.request.keep != "all"))

    def samples(self, micro_batch: int) -> None:
        """One-step samples: fake data of the adv rows, and all other data in data-free mode (equations 5, 9)."""
        rows = self.micro_batches[micro_batch]
        if self.config.adversarial and self.roles[0] != "all" and self.config.shares["adv"] > 0:
            self.add("fake", "student", [(i, "main", 1.0, 0.0) for i in rows if self.roles[i] == "adv"], micro_batch)
        if self.config.data_free:
            self.add("data", "student", [(i, "main", 1.0, 0.0) for i in rows if self.roles[i] != "adv"], micro_batch)

    def guidance(self, micro_batch: int) -> None:
        """Teacher queries of the enhanced target (equation 8)."""
        if not (self.config.enhanced_ratio > 0 and self.request.has_uncond):
            return
        rows = [i for i in self.micro_batches[micro_batch] if self.published or i in self.enhanced]
        cond = [(i, "cond", self.t[i], self.t[i]) for i in rows]
        uncond = [(i, "uncond", self.t[i], self.t[i]) for i in rows]
        self.add_pair("cfg", self.request.cfg_by, cond, uncond, micro_batch, self.request.merge)

    def rollouts(self, micro_batch: int) -> None:
        """Teacher rollouts (equations 10 to 12): N equal Euler segments from max(t - delta, r) down to r."""
        order, delta = self.config.estimate_order, self.config.delta_t
        if order == 0:
            return
        rows = self.micro_batches[micro_batch]
        main = [(i, "main", self.t[i], self.r[i]) for i in rows if self.published or i in self.rollout]
        generated: list[Entry] = []
        if self.draws.roles is None and self.config.adversarial and self.config.consistency_weight > 0:
            generated = [(i, "generated", 1.0, 0.0) for i in rows]
        groups = [main + generated] if self.fits(len(main) + len(generated)) else [main, generated]
        for entries in groups if generated else [main]:
            for k in range(order):
                segment = [(i, kind, *_segment(t, r, delta, order, k)) for i, kind, t, r in entries]
                self.add("rollout", self.request.rollout_by, segment, micro_batch, segment=k)

    def student(self, micro_batch: int) -> None:
        """The differentiated calls."""
        rows = self.student_rows(self.micro_batches[micro_batch])
        if self.draws.roles is not None:
            self.add(
                "student", "student", [(i, "main", self.t[i], self.r[i]) for i in rows], micro_batch, gradient=True
            )
            return
        config = self.config
        if config.estimate_order > 0:
            self.add(
                "student", "student", [(i, "main", self.t[i], self.r[i]) for i in rows], micro_batch, gradient=True
            )
        if config.real_velocity_weight > 0:
            self.add(
                "velocity", "student", [(i, "main", self.t[i], self.t[i]) for i in rows], micro_batch, gradient=True
            )
        if needs_generation(config):
            self.add("generate", "student", [(i, "main", 1.0, 0.0) for i in rows], micro_batch, gradient=True)
        if config.adversarial and config.adversarial_weight > 0:
            fakes = [(i, "main", -self.t[i], -self.t[i]) for i in rows]
            self.add("fake_velocity", "student", fakes, micro_batch, gradient=True)

    def rectify(self, micro_batch: int) -> None:
        """Fake against real velocity of generated samples, by the student (equation 21)."""
        if not (self.config.adversarial and self.config.rectify_weight > 0):
            return
        if self.draws.roles is not None and self.config.shares["e2e"] == 0:
            return
        rows = [i for i in self.micro_batches[micro_batch] if i in self.rectified]
        again = [] if self.draws.t_rectify is None else self.draws.t_rectify.double().tolist()
        fake = [(i, "fake", -again[self.rectified[i]], -again[self.rectified[i]]) for i in rows]
        real = [(i, "real", again[self.rectified[i]], again[self.rectified[i]]) for i in rows]
        self.add_pair("rectify", "student", fake, real, micro_batch, merge=True)

    def published_rows(self) -> int:
        """Rows without gradient of the published schedule: it drops none of a pass's rows."""
        config, all_terms = self.config, self.draws.roles is None
        fakes = 0 if all_terms else self.roles.count("adv")
        data = self.batch - fakes if config.data_free else 0
        guidance = 2 * self.batch if config.enhanced_ratio > 0 and self.request.has_uncond else 0
        walks = 2 if all_terms and config.adversarial and config.consistency_weight > 0 else 1
        return fakes + data + guidance + walks * config.estimate_order * self.batch + 2 * len(self.rectified)

    def build(self) -> Plan:
        most = self.request.micro_batch or self.batch
        self.micro_batches = tuple(tuple(range(i, min(i + most, self.batch))) for i in range(0, self.batch, most))
        micro_batches = range(len(self.micro_batches))
        for phase in (self.samples, *([self.student] if self.published else []), self.guidance, self.rollouts):
            for micro_batch in micro_batches:
                phase(micro_batch)
        for micro_batch in micro_batches:
            if not self.published:
                self.student(micro_batch)
            self.rectify(micro_batch)
        return Plan(
            calls=tuple(self.calls), micro_batches=self.micro_batches, batch=self.batch, schedule=self.request.schedule,
            recipe=self.config.recipe, order=self.config.estimate_order, enhanced=self.enhanced,
            rollout_rows=self.rollout, published_rows=self.published_rows(),
        )  # fmt: skip


def needs_generation(config: TwinFlowConfig) -> bool:
    """Whether `all_terms` generates one-step samples with gradient (equation 26)."""
    consistency = config.consistency_weight > 0 and config.estimate_order > 0
    return config.adversarial and (config.adversarial_weight > 0 or config.rectify_weight > 0 or consistency)


def _segment(t: float, r: float, delta: float, order: int, k: int) -> tuple[float, float]:
    """Times (a, b) of the k-th of N equal segments from max(t - delta, r) to r; empty ones stay exactly at r."""
    start = max(t - delta, r)
    if start <= r:
        return r, r
    nodes = [start + (r - start) * j / order for j in (k, k + 1)]
    return nodes[0], r if k + 1 == order else nodes[1]


def make_plan(config: TwinFlowConfig, draws: Draws, request: PlanOptions | None = None) -> Plan:
    """Plans a step.

    Args:
        config: the objective's settings.
        draws: the step's random numbers; only roles and times matter.
        request: who answers, which schedule, how many rows a call; None: the defaults.

    Returns:
        The plan.
    """
    request = request or PlanOptions()
    return _Planner(config, draws, request).build()


def time_table(plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """(3, entries) on the CPU: t, r and t - r of every entry of every call in order, for one transfer per step."""
    t = [value for p in plan.calls for value in p.t]
    r = [value for p in plan.calls for value in p.r]
    return torch.tensor([t, r, [a - b for a, b in zip(t, r, strict=True)]], dtype=torch.float64).to(dtype)
