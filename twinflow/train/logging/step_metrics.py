"""`StepMetrics`: what steps give, kept on the device and read in one transfer."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed

from twinflow.distributed import world

# Names of the objective's terms, in an order that every rank knows.
TERMS = ("rcgm", "velocity", "real_velocity", "adversarial", "rectify", "consistency")
TRAJECTORY_ROWS = 64  # of a step, at most


class StepMetrics:
    """Collects the steps since the last `flush`.

    Args:
        rows: of a step, on all ranks together.
        seconds: of training before this process.
        twinflow: whether times are worth a trajectory.
    """

    def __init__(self, rows: int, device: torch.device, seconds: float = 0.0, twinflow: bool = True) -> None:
        self._rows, self._device, self.seconds, self._twinflow = rows, device, seconds, twinflow
        self._values: list[torch.Tensor] = []
        self._there: list[list[float]] = []
        self._known: list[dict[str, Any]] = []
        self._since = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # encoders and loading are over

    def add(
        self,
        step: int,
        loss: torch.Tensor,
        terms: Mapping[str, torch.Tensor],
        grad_norm: torch.Tensor,
        learning_rate: float,
        times: list[tuple[float, float]],
    ) -> None:
        """Notes a step; nothing waits for the device.

        Args:
            step: its number, from 1.
            loss, terms: 0-dim, of this rank; `terms` name -> value.
            grad_norm: 0-dim, before clipping.
            times: signed (t, r) of this rank's rows.
        """
        zero = loss.new_zeros(())
        parts = [loss, grad_norm, *(terms.get(name, zero) for name in TERMS)]
        self._values.append(torch.stack([part.detach().to(self._device, torch.float32) for part in parts]))
        self._there.append([float(name in terms) for name in TERMS])  # on the host: a copy to a GPU would wait for it
        shown = [[float(f"{t:.4g}"), float(f"{r:.4g}")] for t, r in times[:TRAJECTORY_ROWS]] if self._twinflow else []
        self._known.append({"step": step, "learning_rate": learning_rate, "trajectory": shown})

    def skip(self, since: float) -> None:
        """Leaves out of the time what was done since a `time.perf_counter()` that is not training."""
        self._since += time.perf_counter() - since

    def flush(self) -> list[dict[str, Any]]:
        """The records of the steps collected, see `RunFolder`; every rank must call it after the same steps."""
        if not self._values:
            return []
        values = torch.cat([torch.stack(self._values), torch.tensor(self._there, device=self._device)], dim=1)
        _, ranks = world()
        if ranks > 1:
            distributed.all_reduce(values)
            values[:, : 2 + len(TERMS)] /= ranks
        read = values.cpu().double().tolist()
        now = time.perf_counter()
        each, self._since = (now - self._since) / len(read), now
        peak = torch.cuda.max_memory_allocated(self._device) / 1e9 if self._device.type == "cuda" else None
        records = []
        for numbers, known in zip(read, self._known, strict=True):
            loss, norm, *terms = numbers[: 2 + len(TERMS)]
            there = numbers[2 + len(TERMS) :]
            self.seconds += each
            records.append({
                "kind": "step", "step": known["step"], "seconds": self.seconds, "loss": loss,
                "terms": {name: value for name, value, n in zip(TERMS, terms, there, strict=True) if n},
                "grad_norm": norm, "learning_rate": known["learning_rate"], "s_per_step": each,
                "rows_per_s": self._rows / each, "peak_gb": peak, "trajectory": known["trajectory"],
            })  # fmt: skip
        self._values, self._there, self._known = [], [], []
        return records


def require_finite(records: list[dict[str, Any]]) -> None:
    """Raises FloatingPointError for the first step whose loss or gradients are not finite, with the terms at fault."""
    for record in records:
        bad = [name for name, value in record["terms"].items() if not math.isfinite(value)]
        if not math.isfinite(record["loss"]) or bad:
            terms = f" (its {', '.join(bad)} term)" if bad else ""
            raise FloatingPointError(f"the loss of step {record['step']} is not finite{terms}")
        if not math.isfinite(record["grad_norm"]):
            raise FloatingPointError(f"the gradients of step {record['step']} are not finite")
