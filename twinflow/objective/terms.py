"""`MicroBatchLoss`: the loss of a micro-batch of a step, one named method per term."""

import torch

from twinflow.objective.rows import Rows
from twinflow.objective.step import Step
from twinflow_kernels import velocity_loss


class MicroBatchLoss:
    """The terms of the rows of one micro-batch, from the velocities its step has gathered.

    Args:
        step: the step; the micro-batch's calls have run.
        micro_batch: its number.

    Attributes:
        terms: name -> weighted contribution to the loss, 0-dim.
    """

    def __init__(self, step: Step, micro_batch: int) -> None:
        self._step, self._micro_batch, self._config = step, micro_batch, step.config
        self._rows: dict[str, tuple[Rows, torch.Tensor]] = {}
        self.terms: dict[str, torch.Tensor] = {}

    def total(self) -> torch.Tensor:
        """Computes the terms and their sum (docs/method.md, equation 23)."""
        if self._step.plan.recipe == "partition":
            self.consistency_and_fake_velocity()
            self.rectify("student", self._config.rectify_loss)
        else:
            self.mean_velocity()
            self.real_velocity()
            self.fake_velocity()
            self.rectify("generate", self._config.rectify_loss)
            self.consistency()
        # Calls that only keep ranks in step stay in the graph with weight 0.
        values = [*self.terms.values(), *(self._nothing(v) for v in self._step.discarded)]
        if not values:  # rows that ran but do not count: a differentiable zero
            values = [
                self._nothing(v)
                for (_, micro_batch), (_, v) in self._step.predictions.items()
                if micro_batch == self._micro_batch
            ]
        return torch.stack(values).sum()

    def require_finite(self) -> None:
        """Raises FloatingPointError naming term and rows of a non-finite loss; waits for the device."""
        for name, (rows, losses) in self._rows.items():
            bad = [row for row, fine in zip(rows, torch.isfinite(losses).tolist(), strict=True) if not fine]
            if bad:
                roles = self._step.batch.draws.roles
                named = [f"{row} ({roles[row]})" if roles else str(row) for row in bad]
                raise FloatingPointError(f"TwinFlowLoss: the {name} loss is not finite in rows {', '.join(named)}")

    def consistency_and_fake_velocity(self) -> None:
        """RCGM of the real rows and the fake velocity of the `adv` rows (equations 13 to 20), in one call."""
        if ("student", self._micro_batch) not in self._step.predictions:
            return
        rows, velocity = self._step.predictions["student", self._micro_batch]
        target = self._step.targets[0]
        losses = self._losses(velocity, rows, target, "main", self._step.table.main, self._config.loss)
        roles = self._step.batch.draws.roles or ()
        counted = self._config.estimate_order > 0
        real = tuple(k for k, row in enumerate(rows) if roles[row] != "adv" and (counted or roles[row] == "mul"))
        fake = tuple(k for k, row in enumerate(rows) if roles[row] == "adv")
        self._file("rcgm" if counted else "velocity", rows, losses, real)
        self._file("adversarial", rows, losses, fake)

    def mean_velocity(self) -> None:
        """RCGM at (t, r) (equation 24)."""
        self._term("rcgm", "student", self._step.table.main, "main")

    def real_velocity(self) -> None:
        """F(x_t, t, t) against v* (equation 25)."""
        self._term("real_velocity", "velocity", self._step.table.velocity)

    def fake_velocity(self) -> None:
        """F(t z + (1 - t) x_f, -t, -t) against z - x_f (equation 26)."""
        if ("fake_velocity", self._micro_batch) not in self._step.predictions:
            return
        rows, velocity = self._step.predictions["fake_velocity", self._micro_batch]
        # z - x_f = F(z, 1, 0), the one-step prediction itself.
        target = self._step.predictions["generate", self._micro_batch][1].detach()
        losses = self._loss(velocity, target, None, None, rows, self._step.table.fake_velocity, self._config.loss)
        self._file("adversarial", rows, losses, tuple(range(len(rows))))

    def consistency(self) -> None:
        """RCGM error of the one-step prediction, x = z at t = 1, r = 0 (equation 28)."""
        if "generated" in self._step.rollout_ends:
            self._term("consistency", "generate", self._step.table.consistency, "generated")

    def rectify(self, prediction: str, loss: str) -> None:
        """Fake minus real velocity of generated samples, as the error of the prediction (equations 21, 22, 27)."""
        step = self._step
        if not step.rectify_velocities or (prediction, self._micro_batch) not in step.predictions:
            return
        run, velocity = step.predictions[prediction, self._micro_batch]
        roles = step.batch.draws.roles
        rows = tuple(row for row in run if roles is None or roles[row] == "e2e")
        if not rows:
            return
        if rows != run:
            velocity = velocity.index_select(0, step.select.index(tuple(run.index(row) for row in rows)))
        fake, real = (step.select.take(step.rectify_velocities[kind], rows) for kind in ("fake", "real"))
        losses = self._loss(velocity, None, fake, real, rows, step.table.rectify, loss)
        self._file("rectify", rows, losses, tuple(range(len(rows))))

    def _term(self, name: str, prediction: str, table: torch.Tensor, rollout: str | None = None) -> None:
        """Files the loss of a prediction against v* in every row."""
        if (prediction, self._micro_batch) not in self._step.predictions:
            return
        rows, velocity = self._step.predictions[prediction, self._micro_batch]
        losses = self._losses(velocity, rows, self._step.targets[0], rollout, table, self._config.loss)
        self._file(name, rows, losses, tuple(range(len(rows))))

    def _losses(
        self,
        velocity: torch.Tensor,
        rows: Rows,
        target: torch.Tensor,
        rollout: str | None,
        table: torch.Tensor,
        loss: str,
    ) -> torch.Tensor:
        step, start, end = self._step, None, None
        if rollout in step.rollout_ends:
            full = step.targets[1] if rollout == "main" else step.generated_start
            start, end = step.select.take(full, rows), step.select.take(step.rollout_ends[rollout], rows)
        return self._loss(velocity, step.select.take(target, rows), start, end, rows, table, loss)

    def _loss(
        self,
        velocity: torch.Tensor,
        target: torch.Tensor | None,
        start: torch.Tensor | None,
        end: torch.Tensor | None,
        rows: Rows,
        table: torch.Tensor,
        loss: str,
    ) -> torch.Tensor:
        config, coefficients = self._config, self._step.select.take(table, rows)
        return velocity_loss(
            velocity, target, start, end, coefficients, loss=loss, alpha=config.barron_alpha, c=config.barron_c
        )

    def _file(self, name: str, rows: Rows, losses: torch.Tensor, at: Rows) -> None:
        """Adds the sum over some entries to a term."""
        if not at:
            return
        chosen = losses if len(at) == len(rows) else losses.index_select(0, self._step.select.index(at))
        self.terms[name] = chosen.sum()
        self._rows[name] = (tuple(rows[k] for k in at), chosen.detach())

    def _nothing(self, velocity: torch.Tensor) -> torch.Tensor:
        weightless = velocity.new_zeros((velocity.shape[0], 4), dtype=self._step.dtype)
        return velocity_loss(velocity, None, None, None, weightless, loss="l2").sum()
