"""`train()` on two processes: DDP and FSDP2 resume to the same bits, check and draw together, and stop together."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers.train_runs import read_metrics
from helpers.training_cases import photos, quiet, same, settings, weights
from torch import distributed

from twinflow.export import export
from twinflow.models import load
from twinflow.train.restore import restore_run
from twinflow.train.run import train

KINDS = {
    "DDP, LoRA": ({}, {"twinflow_recipe": "partition", "twinflow_adversarial_enabled": True}),
    "FSDP2, all weights": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"model_type": "full"}),
}
DEADLINE_S = 120


def on_two(work: Callable[[int], None], environment: dict[str, str], act: Callable[[list[int]], None] | None = None):
    """Runs in two children as a launcher starts them; their exit codes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                             "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                                             "MASTER_PORT": str(port)}  # fmt: skip
                for state in (AcceleratorState, GradientState, PartialState):
                    state._reset_state()
                work(rank)
                distributed.destroy_process_group()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    if act is not None:
        act(children)
    deadline = time.monotonic() + DEADLINE_S
    codes: dict[int, int] = {}
    while len(codes) < 2:
        for child in children:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
            pytest.fail("the ranks wait for each other")
        time.sleep(0.05)
    return [codes[child] for child in children]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resume_to_the_same_bits(tmp_path, kind):
    environment, changes = KINDS[kind]
    photos(tmp_path / "photos", 16)
    changes = changes | {"cache_dir": str(tmp_path / "cache"), "eval_steps": 2, "validation_steps": 4,
                         "eval_share": 0.3, "validation_prompts": ["a temple"]}  # fmt: skip
    whole, broken = (settings(tmp_path, max_train_steps=4, output_dir=str(tmp_path / k), **changes) for k in "ab")
    first = settings(tmp_path, max_train_steps=2, output_dir=str(tmp_path / "b"), **changes)

    def work(rank: int) -> None:
        for run in (whole, first, broken):
            train(run, quiet())

    assert on_two(work, environment) == [0, 0]
    (step, wanted), (_, found) = weights(whole.output_dir), weights(broken.output_dir)
    assert step == 4 and same(found, wanted)
    read = [read_metrics(run.output_dir / "metrics.jsonl").records for run in (whole, broken)]
    lines = [[(r["kind"], r["step"], r["loss"]) for r in records if r["kind"] != "start"] for records in read]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    assert read[0][1]["rows_per_s"] == pytest.approx(4 / read[0][1]["s_per_step"])  # of both processes
    assert (whole.output_dir / "samples" / "step-000004" / "grid.png").exists()
    with pytest.raises(ValueError, match="as many processes as it was saved with, 2, got 1"):
        train(settings(tmp_path, max_train_steps=6, output_dir=str(tmp_path / "a"), **changes), quiet())
    check_export(whole.output_dir, wanted, tmp_path / "export")


def check_export(root: Path, saved: dict, folder: Path) -> None:
    """One process reads the averages that two have kept, in whole."""
    found = restore_run(root)
    shadow = saved["teacher"]["state"]["shadow"]
    export(found.student, folder, teacher=found.teacher)
    assert all(torch.equal(value, shadow[name]) for name, value in found.teacher.parameters().items())
    if found.settings.model_type == "full":
        exported = dict(load(folder).named_parameters())
        assert all(torch.equal(exported[name], value) for name, value in shadow.items())


def test_a_signal_to_one_process_stops_both(tmp_path):
    photos(tmp_path / "photos", 16)
    run = settings(tmp_path, max_train_steps=500, checkpointing_steps=0, logging_steps=500)

    def act(children: list[int]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.5)
        os.kill(children[1], signal.SIGTERM)

    assert on_two(lambda rank: train(run, quiet()), {}, act) == [0, 0]
    step, _ = weights(run.output_dir)
    assert 0 < step < 500
    steps = [r["step"] for r in read_metrics(run.output_dir / "metrics.jsonl").records if r["kind"] == "step"]
    assert steps == list(range(1, step + 1))
