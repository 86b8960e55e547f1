"""Kills at random moments: whatever a run was doing, the same command goes on to the same weights."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from helpers.train_runs import read_metrics
from helpers.training_cases import forked, photos, quiet, same, settings, weights

from twinflow.train.checkpoint.checkpoint import latest_checkpoint
from twinflow.train.run import train

SEED = int(os.environ.get("TWINFLOW_CRASH_SEED", time.time_ns() % 10_000))
STEPS = 10


def run(folder: Path):
    return settings(folder, max_train_steps=STEPS, eval_steps=4, eval_share=0.3, validation_steps=5, lr_warmup_steps=3,
                    validation_prompts=["the digit 3"], checkpoints_total_limit=2)  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, float]:
    """A run's folder, and how long it took."""
    folder = tmp_path_factory.mktemp("unbroken")
    photos(folder / "photos", 12)
    begun = time.monotonic()
    assert forked(lambda: train(run(folder), quiet())) == 0
    return folder, time.monotonic() - begun


def check(folder: Path, unbroken: Path) -> None:
    """A finished run has the weights, the losses, the samples and the folders of the unbroken one."""
    (step, found), (_, wanted) = weights(folder / "run"), weights(unbroken / "run")
    assert step == STEPS and same(found, wanted)
    read = [read_metrics(root / "run" / "metrics.jsonl") for root in (folder, unbroken)]
    kept = [[(r["kind"], r["step"], r["loss"]) for r in m.records if r["kind"] != "start"] for m in read]
    assert kept[0] == kept[1] and len(kept[1]) == STEPS + 3
    names = [sorted(p.relative_to(root / "run" / "samples") for p in (root / "run" / "samples").rglob("*"))
             for root in (folder, unbroken)]  # fmt: skip
    assert names[0] == names[1]
    for name in (n for n in names[0] if n.suffix == ".png"):
        assert (folder / "run/samples" / name).read_bytes() == (unbroken / "run/samples" / name).read_bytes()
    assert [p.name for p in sorted((folder / "run").glob("checkpoint-*"))] == ["checkpoint-000008", "checkpoint-000010"]


@pytest.mark.parametrize("kill", [*range(3), *(pytest.param(k, marks=pytest.mark.slow) for k in range(3, 30))])
def test_kill_at_a_random_moment(unbroken, tmp_path, kill):
    """From the first second, encoding, to the last; every third run is killed twice."""
    whole, seconds = unbroken
    rng = random.Random(SEED + kill)
    shutil.copytree(whole / "photos", tmp_path / "photos")
    if rng.random() < 0.5:  # the cache is there, so that more of the kills meet the loop
        shutil.copytree(whole / "run" / "cache", tmp_path / "run" / "cache")
    for _ in range(1 + kill % 3 // 2):
        after = rng.uniform(0.1, 1.0) * seconds
        status = forked(lambda: train(run(tmp_path), quiet()), after)
        assert status in (-9, 0), f"seed {SEED + kill}, killed after {after:.2f} s"
        metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
        done = max((r["step"] for r in metrics.records), default=0)
        path = latest_checkpoint(tmp_path / "run")
        assert done - (0 if path is None else int(path.name[-6:])) <= 2 + 2, "more is lost than since a checkpoint"
    assert forked(lambda: train(run(tmp_path), quiet())) == 0, f"seed {SEED + kill}"
    check(tmp_path, whole)
    assert not [p for p in (tmp_path / "run").rglob(".*") if "partial" in p.name or "replaced" in p.name]


def test_the_config_of_a_run_is_a_config(unbroken, tmp_path):
    """What a run wrote down resolves to the same settings, and a run from it is the same run."""
    from twinflow.train import read_config

    whole, _ = unbroken
    again = read_config(whole / "run" / "config.json", {})
    assert again == run(whole)
    moved = read_config(whole / "run" / "config.json", {"output_dir": str(tmp_path / "run")})
    assert moved.cache_dir == whole / "run" / "cache"
    assert train(moved, quiet()) == STEPS
    assert same(weights(tmp_path / "run")[1], weights(whole / "run")[1])
    assert json.loads((whole / "run" / "environment.json").read_text())["torch"]
