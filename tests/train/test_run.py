"""`train()`: resumed runs equal unbroken ones bit for bit; roles, sizes, pieces; what ends a run, and how."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.train_runs import read_metrics
from helpers.training_cases import forked, photos, quiet, same, settings, weights

from twinflow.train.checkpoint.checkpoint import latest_checkpoint
from twinflow.train.checkpoint.folder_lock import lock_folder, unlock_folder
from twinflow.train.run import TrainingStopped, train
from twinflow.train.signals import StopRequest

RUNS = {
    "sd3, LoRA": ("sd3", {}),
    "sd3, all weights": ("sd3", {"model_type": "full", "lr_warmup_steps": 4}),
    "sd3, partition": ("sd3", {"twinflow_recipe": "partition", "twinflow_adversarial_enabled": True}),
    "qwen_image, 40gb": ("qwen_image", {"memory_preset": "40gb"}),
    "sana, RAdam": ("sana", {"model_type": "full", "optimizer": "radam", "mixed_precision": "no"}),
    "z_image, 8-bit AdamW": ("z_image", {"optimizer": "adamw8bit"}),
    "flux, its own teacher": ("flux", {"use_ema": None, "twinflow_allow_no_ema_teacher": True}),
    "sd15": ("sd15", {"memory_preset": "checkpoint"}),
    "sd3, flow matching": ("sd3", {"twinflow_enabled": None, "train_batch_size": 2}),
}


def steps(root: Path) -> list[dict]:
    return [record for record in read_metrics(root / "metrics.jsonl").records if record["kind"] == "step"]


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_unbroken_one(tmp_path, run):
    family, changes = RUNS[run]
    changes = changes | {"cache_dir": str(tmp_path / "cache"), "max_train_steps": 5}
    whole, broken = (settings(tmp_path, family, **changes | {"output_dir": str(tmp_path / k)}) for k in "ab")
    first = settings(tmp_path, family, **changes | {"output_dir": str(tmp_path / "b"), "max_train_steps": 3})
    assert train(whole, quiet()) == 5
    assert train(first, quiet()) == 3
    console = quiet()
    assert train(broken, console) == 5
    assert "going on after step 3" in console.export_text()
    (_, wanted), (step, found) = weights(whole.output_dir), weights(broken.output_dir)
    assert step == 5 and same(found, wanted)
    assert not same(found["student"], weights_at(whole.output_dir, 4)["student"])  # the last step did something
    losses = [[record["loss"] for record in steps(root)] for root in (whole.output_dir, broken.output_dir)]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def weights_at(root: Path, step: int) -> dict:
    from twinflow.train.checkpoint.checkpoint import read_checkpoint

    return read_checkpoint(root / f"checkpoint-{step:06d}")["shared"]


def test_one_row_at_a_time_deals_every_role_in_each_step(tmp_path):
    """Batch 1, four of them: one row of each role in every step, whatever the sizes of the images are."""
    run = settings(tmp_path, twinflow_recipe="partition", twinflow_adversarial_enabled=True, max_train_steps=5,
                   gradient_accumulation_steps=4)  # fmt: skip
    train(run, quiet())
    for record in steps(run.output_dir):
        times = record["trajectory"]
        assert sum(t == 1 and r == 0 for t, r in times) == 1 and sum(t < 0 for t, _ in times) == 1
        assert len(times) == 4 and {"rcgm", "adversarial", "rectify"} == record["terms"].keys()
        assert record["loss"] == pytest.approx(sum(record["terms"].values()), rel=1e-5)


def test_pieces_change_nothing(tmp_path):
    """Four rows at once, or one by one by a memory preset: the same step but for rounding."""
    found = []
    for preset in ("batch", "rows"):
        run = settings(tmp_path, memory_preset=preset, output_dir=str(tmp_path / preset), max_train_steps=2,
                       train_batch_size=4, mixed_precision="no", cache_dir=str(tmp_path / "cache"))  # fmt: skip
        train(run, quiet())
        found.append(weights(run.output_dir)[1]["student"])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(found[1][name], value) for name, value in found[0].items())  # they were other calls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end_well(tmp_path, number):
    run = settings(tmp_path, max_train_steps=400, checkpointing_steps=0)
    train(settings(tmp_path, max_train_steps=1, checkpointing_steps=0), quiet())  # the cache is there
    console, out = quiet(), tmp_path / "said"

    def work() -> None:
        train(run, console)
        out.write_text(console.export_text())

    assert forked(work, 2.0, number) == 0
    step, _ = weights(run.output_dir)
    assert 1 < step < 400
    assert f"stopped by {signal.Signals(number).name} after step {step}: saved" in out.read_text()
    assert [record["step"] for record in steps(run.output_dir)] == list(range(1, step + 1))


def test_a_second_interrupt_does_not_wait():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that is started in the background ignores it
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop and stop.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_kept(tmp_path):
    train(settings(tmp_path, max_train_steps=2), quiet())
    run = settings(tmp_path, max_train_steps=30, learning_rate=1e3, max_grad_norm=0, mixed_precision="no",
                   output_dir=str(tmp_path / "wild"), logging_steps=3, model_type="full")  # fmt: skip
    with pytest.raises(TrainingStopped, match=r"of step \d+ (is|are) not finite.*checkpoint.*lower learning_rate"):
        train(run, quiet())
    path = latest_checkpoint(run.output_dir)
    records = read_metrics(run.output_dir / "metrics.jsonl").records
    bad = [r["step"] for r in records if r["kind"] == "step" and (r["loss"] is None or r["grad_norm"] is None)]
    assert bad, "the run should have gone wrong"
    if path is not None:
        assert int(path.name[-6:]) < bad[0]
        assert all(value.isfinite().all() for value in weights(run.output_dir)[1]["student"].values())


def test_a_full_disk_ends_the_run_with_its_last_checkpoint_whole(tmp_path):
    """A real limit on the size of files, which the checkpoints of step 4 does not fit into."""
    run = settings(tmp_path, max_train_steps=2)
    train(run, quiet())
    before, more = weights(run.output_dir), settings(tmp_path, max_train_steps=4)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        try:
            train(more, quiet())
        except OSError as error:
            assert "write_checkpoint: folder must take" in str(error)
            os._exit(7)

    assert forked(work) == 7
    after = weights(run.output_dir)
    assert after[0] == before[0] == 2 and same(after[1], before[1])
    assert train(more, quiet()) == 4


def test_what_a_run_began_with_stays(tmp_path):
    run = settings(tmp_path, max_train_steps=1)
    train(run, quiet())
    with pytest.raises(ValueError, match=r"must go on with what it began with .*lora_rank was 2 and is now 4"):
        train(settings(tmp_path, max_train_steps=2, lora_rank=4), quiet())
    with pytest.raises(ValueError, match=r"output_dir must have no checkpoints where resume_from_checkpoint is no"):
        train(settings(tmp_path, max_train_steps=2, resume_from_checkpoint="no"), quiet())
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint must be latest, no, a checkpoint of .* got 'nowhere'"
    ):
        train(settings(tmp_path, resume_from_checkpoint="nowhere"), quiet())
    console = quiet()
    assert train(run, console) == 1 and "has taken its 1 step; raise max_train_steps" in console.export_text()
    changes = {"learning_rate": 1e-5, "adam_beta2": 0.5, "lr_warmup_steps": 4, "memory_preset": "rows"}
    assert train(settings(tmp_path, max_train_steps=3, **changes), quiet()) == 3
    assert json.loads((run.output_dir / "config.json").read_text())["learning_rate"] == 1e-5
    steps = [r for r in read_metrics(run.output_dir / "metrics.jsonl").records if r["kind"] == "step"]
    assert [r["learning_rate"] for r in steps] == [1e-3, 1e-5 * 2 / 4, 1e-5 * 3 / 4]
    (group,) = weights(run.output_dir)[1]["optimizer"]["state_dict"]["param_groups"]
    assert group["betas"] == (0.9, 0.5) and group["lr"] == 1e-5


def test_a_run_goes_on_from_a_checkpoint_of_another(tmp_path):
    train(settings(tmp_path, max_train_steps=4), quiet())
    run = settings(tmp_path, max_train_steps=4, output_dir=str(tmp_path / "other"),
                   resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-000002"))  # fmt: skip
    assert train(run, quiet()) == 4
    assert same(weights(tmp_path / "run")[1], weights(run.output_dir)[1])


def test_two_runs_do_not_share_a_folder(tmp_path):
    run = settings(tmp_path, max_train_steps=1)
    lock_folder(run.output_dir)

    def work() -> None:
        with pytest.raises(ValueError, match=r"train: output_dir must belong to no other run, got .*which process"):
            train(run, quiet())

    assert forked(work) == 0
    unlock_folder(run.output_dir)
    assert train(run, quiet()) == 1


def test_damaged_checkpoints_are_passed_over(tmp_path):
    run = settings(tmp_path, max_train_steps=4)
    train(run, quiet())
    wanted = weights(run.output_dir)
    path = run.output_dir / "checkpoint-000004" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    console = quiet()
    assert train(run, console) == 4
    said = console.export_text()
    assert "checkpoint-000004 is passed over" in said and "going on after step 2" in said
    assert same(weights(run.output_dir)[1], wanted[1])


def test_data_that_is_gone(tmp_path):
    run = settings(tmp_path, max_train_steps=2)
    train(run, quiet())
    more = settings(tmp_path, max_train_steps=3)
    (tmp_path / "photos").rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"train: instance_data_dir must be a folder that exists"):
        train(more, quiet())
    assert weights(run.output_dir)[0] == 2


def test_data_that_has_grown(tmp_path):
    """Weights, average and optimizer go on, with an order of the new data that itself resumes."""
    changes = {"cache_dir": str(tmp_path / "cache"), "eval_share": 0}
    first = settings(tmp_path, max_train_steps=2, **changes)
    train(first, quiet())
    photos(tmp_path / "photos", 14)
    (tmp_path / "photos" / "00.txt").write_text("its caption, mended")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    console = quiet()
    assert train(settings(tmp_path, max_train_steps=6, **changes), console) == 6
    said = console.export_text()
    assert "going on after step 2" in said and "the data has changed since: its 14 entries come in a new order" in said
    for last in (4, 6):  # in two goes: the same steps, and nothing has changed since the second
        console = quiet()
        train(settings(tmp_path, max_train_steps=last, output_dir=str(tmp_path / "other"), **changes), console)
        assert ("the data has changed" in console.export_text()) == (last == 4)
    assert same(weights(tmp_path / "other")[1], weights(tmp_path / "run")[1])


def test_going_back_to_an_earlier_checkpoint(tmp_path):
    """Later checkpoints are no longer the latest ones, nor do they push out those of the new way."""
    train(settings(tmp_path, max_train_steps=6), quiet())
    back = {"resume_from_checkpoint": "checkpoint-2", "checkpoints_total_limit": 2}
    console = quiet()
    assert train(settings(tmp_path, max_train_steps=3, **back), console) == 3
    said = console.export_text()
    assert "going on after step 2" in said and "checkpoint-000006 is of the steps that are now taken anew" in said
    found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert found == [f"checkpoint-00000{k}" for k in ("2", "3", "4.retired", "6.retired")]
    console = quiet()
    assert train(settings(tmp_path, max_train_steps=4), console) == 4
    assert "going on after step 3" in console.export_text()


def test_prompts_alone(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cube\na blue ball\n")
    run = settings(tmp_path, prompts_file=str(tmp_path / "prompts.txt"), instance_data_dir=None, max_train_steps=2,
                   twinflow_recipe="partition")  # fmt: skip
    assert train(run, quiet()) == 2 and run.twinflow.data_free


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(tmp_path):
    found = []
    for compiled in (False, True):
        run = settings(tmp_path, max_train_steps=2, compile_blocks=compiled, output_dir=str(tmp_path / f"{compiled}"),
                       aspect_buckets=False, mixed_precision="no", cache_dir=str(tmp_path / "cache"))  # fmt: skip
        train(run, quiet())
        found.append([record["loss"] for record in steps(run.output_dir)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
