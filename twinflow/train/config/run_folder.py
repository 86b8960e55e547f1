"""`RunFolder`: what a run keeps, and where: the one contract between the loop and whoever looks at its results."""

from pathlib import Path


class RunFolder:
    """The folder of a run (`output_dir`).

    `metrics.jsonl` has a JSON object a line, in order of `step`; floats that are not finite are null:

    - `{"kind": "start", "step", "at"}`: the run begins or goes on after `step` steps; `at` is an ISO time.
    - `{"kind": "step", "step", "seconds", "loss", "terms", "grad_norm", "learning_rate", "s_per_step",
      "rows_per_s", "peak_gb", "trajectory"}`: an optimizer step, of all ranks together; `seconds` of training so far,
      `terms` name -> value, `peak_gb` GB (1e9 bytes) or null without CUDA, `trajectory` the step's times as pairs
      [t, r], signed, at most 64 of them, empty without TwinFlow.
    - `{"kind": "evaluation", "step", "loss", "terms"}`: the held-out images at fixed draws.

    `samples/step-000500/` and `samples/base/` have images and `samples.json`:
    `{"step", "weights": "ema" | "student" | "base", "width", "height", "images": [{"file", "prompt", "steps", "style",
    "guidance", "seed"}], "grid": "grid.png"}`, files beside it.

    Attributes:
        root: the folder.
        config: the resolved settings, a config file again.
        environment: versions and devices, a JSON object of texts and numbers.
        metrics: what was measured on the way.
        samples: images drawn on the way, a folder for each time.
        report: the page of `twinflow report`.
        logs: of TensorBoard.
        wandb_id: the run's identity in wandb, a line of text.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config, self.environment = root / "config.json", root / "environment.json"
        self.metrics, self.samples, self.report = root / "metrics.jsonl", root / "samples", root / "report.html"
        self.logs, self.wandb_id = root / "logs", root / "wandb-id.txt"

    def samples_at(self, step: int | None) -> Path:
        """The images after a number of steps; None: of the base model."""
        return self.samples / ("base" if step is None else f"step-{step:06d}")
