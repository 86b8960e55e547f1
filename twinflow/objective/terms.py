"""The terms of the loss, one method of `MicroBatchLoss` each; numbers are equations of docs/method.md.

`partition`, every row has one role:
    consistency_and_fake_velocity   (13)-(20)  R = clamp(((t - r) F - S) / delta - v*), and R = F - v in `adv` rows
    rectify                         (21), (22) R = clamp(F(x', -t', -t') - F(x', t', t')) as the error of F(z, 1, 0)
`all_terms`, every row has all terms:
    mean_velocity                   (24)       R = clamp(((t - r) F - S) / delta - v*)
    real_velocity                   (25)       R = F(x_t, t, t) - v*
    fake_velocity                   (26)       R = F(t z + (1 - t) x_f, -t, -t) - (z - x_f)
    rectify                         (27)       R = F(x', -t', -t') - F(x', t', t') as the error of F(z, 1, 0)
    consistency                     (28)       R = clamp((F(z, 1, 0) - S) / delta - v*)
S is the teacher's rollout, x_start - x_end (11), (12); v* the target with guidance (8). Which rows have which
coefficients stands in row_coefficients.py; `twinflow_kernels.velocity_loss` makes loss and gradient of R (17), (18).
"""

import itertools

import torch

from twinflow.objective.rows import Rows, positions
from twinflow.objective.step import Step
from twinflow_kernels import velocity_loss

Target = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # v*, and the ends of a rollout


class MicroBatchLoss:
    """The terms of the rows of one micro-batch, from the velocities its step has gathered.

    Args:
        step: the step; the micro-batch's calls have run.
        micro_batch: its number.

    Attributes:
        terms: name -> weighted contribution to the loss, 0-dim, detached.
    """

    def __init__(self, step: Step, micro_batch: int) -> None:
        self._step, self._micro_batch, self._config = step, micro_batch, step.config
        self._sums: list[torch.Tensor] = []
        self._rows: dict[str, tuple[Rows, torch.Tensor]] = {}
        self.terms: dict[str, torch.Tensor] = {}

    def total(self) -> torch.Tensor:
        """Computes the terms and their sum (docs/method.md, equation 23)."""
        if self._step.plan.recipe == "partition":
            self.consistency_and_fake_velocity()
            self.rectify("student")
        else:
            self.mean_velocity()
            self.real_velocity()
            self.fake_velocity()
            self.rectify("generate")
            self.consistency()
        # Calls that only keep ranks in step stay in the graph with weight 0.
        sums = [*self._sums, *(self._weightless(v) for v in self._step.discarded)]
        if not self.terms and not self._step.discarded:  # rows that ran but do not count: a differentiable zero
            predictions = self._step.predictions.items()
            sums = [self._weightless(v) for (_, number), (_, v) in predictions if number == self._micro_batch]
        if self._config.check_finite:
            self._require_finite()
        if len(sums) <= 2:
            return sums[0] if len(sums) == 1 else sums[0] + sums[1]
        return torch.stack(sums).sum()

    def _require_finite(self) -> None:
        """Raises FloatingPointError naming term and rows of a non-finite loss; waits for the device."""
        for name, (rows, losses) in self._rows.items():
            bad = [row for row, fine in zip(rows, torch.isfinite(losses).tolist(), strict=True) if not fine]
            if bad:
                roles = self._step.draws.roles
                named = [f"{row} ({roles[row]})" if roles else str(row) for row in bad]
                raise FloatingPointError(f"TwinFlowLoss: the {name} loss is not finite in rows {', '.join(named)}")

    def consistency_and_fake_velocity(self) -> None:
        """RCGM of the real rows and the fake velocity of the `adv` rows (equations 13 to 20), in one call."""
        if ("student", self._micro_batch) not in self._step.predictions:
            return
        rows, velocity = self._step.predictions["student", self._micro_batch]
        draws, chosen, counted = self._step.draws, list(rows), self._config.estimate_order > 0
        adv = draws.mask("adv")[chosen]
        real = tuple((~adv if counted else draws.mask("mul")[chosen]).nonzero()[0].tolist())
        fake = tuple(adv.nonzero()[0].tolist())
        terms: dict[str, Rows | None] = {"rcgm" if counted else "velocity": real, "adversarial": fake}
        target = self._target(rows, "main")
        self._add(velocity, rows, target, self._step.coefficients.main, self._config.loss, terms)

    def mean_velocity(self) -> None:
        """RCGM at (t, r) (equation 24)."""
        self._add_prediction("rcgm", "student", self._step.coefficients.main, "main")

    def real_velocity(self) -> None:
        """F(x_t, t, t) against v* (equation 25)."""
        self._add_prediction("real_velocity", "velocity", self._step.coefficients.velocity)

    def fake_velocity(self) -> None:
        """F(t z + (1 - t) x_f, -t, -t) against z - x_f (equation 26)."""
        if ("fake_velocity", self._micro_batch) not in self._step.predictions:
            return
        rows, velocity = self._step.predictions["fake_velocity", self._micro_batch]
        # z - x_f = F(z, 1, 0), the one-step prediction itself.
        target = self._step.predictions["generate", self._micro_batch][1].detach()
        coefficients = self._step.coefficients.fake_velocity
        self._add(velocity, rows, (target, None, None), coefficients, self._config.loss, {"adversarial": None})

    def consistency(self) -> None:
        """RCGM error of the one-step prediction, x = z at t = 1, r = 0 (equation 28)."""
        if "generated" in self._step.rollout_ends:
            self._add_prediction("consistency", "generate", self._step.coefficients.consistency, "generated")

    def rectify(self, prediction: str) -> None:
        """Fake minus real velocity of generated samples, as the error of the prediction (equations 21, 22, 27)."""
        step = self._step
        if not step.rectify_velocities or (prediction, self._micro_batch) not in step.predictions:
            return
        run, velocity = step.predictions[prediction, self._micro_batch]
        rows = run
        if step.draws.roles is not None:
            rows = tuple(itertools.compress(run, step.draws.mask("e2e")[list(run)].tolist()))
        if not rows:
            return
        if rows != run:
            velocity = velocity.index_select(0, step.select.index(positions(rows, run)))
        fake, real = (step.select.take(step.rectify_velocities[kind], rows) for kind in ("fake", "real"))
        coefficients, loss = step.coefficients.rectify, self._config.rectify_loss
        self._add(velocity, rows, (None, fake, real), coefficients, loss, {"rectify": None})

    def _add_prediction(
        self, term: str, prediction: str, coefficients: torch.Tensor, rollout: str | None = None
    ) -> None:
        """Adds the loss of a prediction against v* in every row."""
        if (prediction, self._micro_batch) in self._step.predictions:
            rows, velocity = self._step.predictions[prediction, self._micro_batch]
            self._add(velocity, rows, self._target(rows, rollout), coefficients, self._config.loss, {term: None})

    def _target(self, rows: Rows, rollout: str | None) -> Target:
        """v* of some rows, and the ends of their rollout, None where they have none."""
        step = self._step
        target = step.select.take(step.targets[0], rows)
        if rollout not in step.rollout_ends:
            return target, None, None
        start = step.targets[1] if rollout == "main" else step.generated_start
        return target, step.select.take(start, rows), step.select.take(step.rollout_ends[rollout], rows)

    def _add(
        self,
        velocity: torch.Tensor,
        rows: Rows,
        target: Target,
        coefficients: torch.Tensor,
        loss: str,
        terms: dict[str, Rows | None],
    ) -> None:
        """Adds the loss of velocities to the total, and its sums over some entries (None: all) to the terms."""
        if not any(at is None or at for at in terms.values()):
            return
        select, config = self._step.select, self._config
        losses = velocity_loss(
            velocity, *target, select.take(coefficients, rows), loss=loss, alpha=config.barron_alpha, c=config.barron_c
        )
        total, detached = losses.sum(), losses.detach()  # rows that do not count have weight 0
        self._sums.append(total)
        for name, at in terms.items():
            if at is None or len(at) == len(rows):
                self.terms[name], self._rows[name] = total.detach(), (rows, detached)
            elif at:
                chosen = detached.index_select(0, select.index(at))
                self.terms[name], self._rows[name] = chosen.sum(), (tuple(rows[k] for k in at), chosen)

    def _weightless(self, velocity: torch.Tensor) -> torch.Tensor:
        coefficients = velocity.new_zeros((velocity.shape[0], 4), dtype=self._step.dtype)
        return velocity_loss(velocity, None, None, None, coefficients, loss="l2").sum()
