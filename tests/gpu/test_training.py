"""The trainer on a GPU: it resumes, does not wait for the device in a step, and says what to do without memory."""

import pytest
import torch
from helpers.train_runs import read_metrics
from helpers.training_cases import quiet, settings, weights

from twinflow.train.loop import Loop
from twinflow.train.run import TrainingStopped, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("changes", [{}, {"model_type": "full"}, {"memory_preset": "40gb"}, {"optimizer": "adamw8bit"}])
def test_a_resumed_run_is_near_the_unbroken_one(tmp_path, changes):
    """`auto` where no preset is named; atomic additions of other libraries may change bits."""
    changes = changes | {"cache_dir": str(tmp_path / "cache"), "validation_steps": 3, "eval_steps": 3}
    whole, broken = (settings(tmp_path, **changes | {"output_dir": str(tmp_path / k)}) for k in "ab")
    train(whole, quiet())
    train(settings(tmp_path, **changes | {"output_dir": str(tmp_path / "b"), "max_train_steps": 4}), quiet())
    train(broken, quiet())
    (_, wanted), (step, found) = weights(whole.output_dir), weights(broken.output_dir)
    assert step == 6
    for name, value in wanted["student"].items():
        torch.testing.assert_close(found["student"][name], value, rtol=1e-2, atol=1e-3)
    records = [r for r in read_metrics(whole.output_dir / "metrics.jsonl").records if r["kind"] == "step"]
    assert len(records) == 6 and all(r["peak_gb"] > 0 for r in records)


def test_a_step_does_not_wait_for_the_device(tmp_path, monkeypatch):
    """No copy to the host and no synchronisation in a step, once everything has been made."""
    step = Loop._step

    def watched(self, metrics):
        torch.cuda.set_sync_debug_mode("error" if self.step >= 2 else "default")
        try:
            step(self, metrics)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Loop, "_step", watched)
    run = settings(tmp_path, memory_preset="rows", logging_steps=6, checkpointing_steps=0, twinflow_recipe="partition",
                   twinflow_adversarial_enabled=True)  # fmt: skip
    assert train(run, quiet()) == 6


def test_the_peak_of_a_step_is_not_that_of_what_came_before(tmp_path):
    """As the encoders, which may need more than training."""
    before = torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda")
    del before
    run = settings(tmp_path, max_train_steps=2)
    train(run, quiet())
    records = [r for r in read_metrics(run.output_dir / "metrics.jsonl").records if r["kind"] == "step"]
    assert len(records) == 2 and all(0 < r["peak_gb"] < 1 for r in records)


def test_no_memory_left_names_forecast_actual_and_a_smaller_preset(tmp_path):
    """On a budget of a few MB, which the blocks' activations do not fit into."""
    train(settings(tmp_path, max_train_steps=1), quiet())  # encoded, and CUDA is warm
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 8 * 2**20) / total))
    changes = {"train_batch_size": 64, "gradient_accumulation_steps": 1, "cache_dir": str(tmp_path / "run" / "cache")}
    run = settings(tmp_path, memory_preset="batch", output_dir=str(tmp_path / "b"), **changes)
    try:
        with pytest.raises(TrainingStopped, match=r"no memory left on cuda.*") as raised:
            train(run, quiet())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = str(raised.value)
    assert "while loading" in said or ("memory preset batch took" in said and "try --memory_preset" in said)
