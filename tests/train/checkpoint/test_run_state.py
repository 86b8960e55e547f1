"""A run's state: what is kept, that a resumed run equals an unbroken one bit for bit, that a wrong state is refused."""

import copy
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from helpers.train_runs import sd3_run, toy_run
from helpers.training_cases import same
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from twinflow.train.checkpoint.checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint
from twinflow.train.checkpoint.run_state import RunState

CASES = (
    (True, "adamw", None), (True, "adamw", "40gb"), (True, "bitsandbytes", "40gb"), (True, "torchao", "40gb"),
    (True, "radam", "40gb"), (True, "bitsandbytes", "24gb"), (False, "adamw", None), (False, "radam", "checkpoint"),
    (False, "bitsandbytes", None), (False, "torchao", None),
)  # fmt: skip


@pytest.mark.parametrize(("lora", "optimizer", "preset"), CASES)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, lora, optimizer, preset):
    """Every bit of the state after two more steps; the other run starts from other weights and one step in."""
    whole = sd3_run(lora, optimizer, preset).advance(2)
    path = write_checkpoint(tmp_path, 2, whole.state.collect())
    expected = whole.advance(2).state.collect()
    resumed = sd3_run(lora, optimizer, preset, seed=1)
    random.random(), np.random.rand(), torch.rand(1)
    resumed.state.restore(read_checkpoint(path))
    path.rename(tmp_path / "gone")
    assert resumed.progress["step"] == 2
    found = resumed.advance(2).state.collect()
    assert found["ranks"][0]["extra"] == expected["ranks"][0]["extra"]
    assert same(plain(found), plain(expected))
    trained = {name for name, p in whole.student.named_parameters() if p.requires_grad}
    assert set(expected["shared"]["student"]) == trained and len(trained) > 5


def plain(tree):
    """torchao's states as their parts."""
    if hasattr(tree, "codes"):
        return [tree.codes, tree.scale, tree.qmap, tree.signed, tree.dtype]
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return type(tree)(map(plain, tree)) if type(tree) in (list, tuple) else tree


def test_collecting_copies_and_changes_nothing():
    expected = toy_run().advance(3).state.collect()
    run = toy_run().advance(1)
    tree = run.state.collect()
    before = copy.deepcopy(tree)
    run.advance(2)
    assert same(tree, before) and same(run.state.collect(), expected)
    run.state.restore(tree)
    run.advance(2)
    assert same(tree, before), "the run went on in the tree's own tensors"
    assert same(run.state.collect(), expected)


def test_a_run_of_few_parts():
    student = torch.nn.Linear(2, 3)
    tree = RunState(student).collect()
    other = torch.nn.Linear(2, 3)
    RunState(other).restore(tree)
    assert torch.equal(student.weight, other.weight)
    with pytest.raises(ValueError, match="restore: optimizer must be there where it was saved, and only there"):
        RunState(other, optimizer=torch.optim.AdamW(other.parameters())).restore(tree)
    foreign = RunState(other, optimizer=torch.optim.AdamW(student.parameters()))
    with pytest.raises(ValueError, match="RunState: optimizer must train trainable parameters of the student"):
        foreign.collect()


def unchanged(run, tree, message):
    before = run.state.collect()
    with pytest.raises(ValueError, match=message):
        run.state.restore(tree)
    assert same(run.state.collect(), before)


def test_another_rank_or_model_is_refused_by_name():
    run = sd3_run(True, "adamw")
    tree = run.advance(1).state.collect()
    wider = sd3_run(True, "adamw", rank=3)
    unchanged(wider, tree, r"restore: student .*lora_A.* must be of shape \(3, .*\), got \(2, .*another model or rank")
    unchanged(sd3_run(False, "adamw"), tree, "restore: student must have the names that were saved, got a difference")


def without(tree, *keys):
    *parents, last = keys
    for key in parents:
        tree = tree[key]
    del tree[last]


def put(tree, value, *keys):
    *parents, last = keys
    for key in parents:
        tree = tree[key]
    tree[last] = value


S, OPT, R = "shared", ("shared", "optimizer", "state_dict"), ("ranks", 0, "streams")
WRONG = {
    "no optimizer": (lambda t: put(t, None, S, "optimizer"), "optimizer must be there"),
    "no student": (lambda t: without(t, S, "student"), "state must have the names"),
    "a missing name": (lambda t: without(t, S, "student", "first.weight"), "only in this run first.weight"),
    "dtype": (lambda t: put(t, torch.zeros(5).double(), S, "student", "second.bias"), "float32, got torch.float64"),
    "no tensor": (lambda t: put(t, 3, S, "student", "second.bias"), "must be a tensor, got int"),
    "teacher": (lambda t: put(t, "x.Frozen", S, "teacher", "kind"), "teacher must be twinflow.EMATeacher"),
    "average": (lambda t: put(t, torch.zeros(1), S, "teacher", "state", "shadow", "second.bias"), r"shape \(5,\)"),
    "decay": (lambda t: put(t, "1", S, "teacher", "state", "decay"), r"teacher\['decay'\] must be of type float"),
    "roles": (lambda t: without(t, S, "criterion", "state", "roles", "counts", "mul"), "criterion.*this run mul"),
    "kind": (lambda t: put(t, "torch.SGD", S, "optimizer", "kind"), "optimizer must be torch.AdamW, got 'torch.SGD'"),
    "order": (lambda t: t[S]["optimizer"]["parameters"][0].reverse(), "saved parameters in the saved order"),
    "group": (lambda t: without(t, *OPT, "param_groups", 0, "lr"), "only in this run lr"),
    "lr": (lambda t: put(t, None, *OPT, "param_groups", 0, "lr"), "must be of type float"),
    "numbers": (lambda t: put(t, [1, 0, 2, 3], *OPT, "param_groups", 0, "params"), "must number the parameters"),
    "moment": (lambda t: put(t, torch.zeros(3), *OPT, "state", 0, "exp_avg"), "weight, exp_avg must be of shape"),
    "codes": (lambda t: put(t, torch.zeros(16, 10).byte(), *OPT, "state", 0, "exp_avg"), "with its map and scales"),
    "state": (lambda t: put(t, 3, *OPT, "state", 0), "must be a dict, got int"),
    "nested": (lambda t: put(t, 3, *OPT, "state", 0, "__bnb_optimizer_quant_state__"), "in a dict, got int"),
    "another": (lambda t: put(t, {}, *OPT, "state", 99), "numbers of parameters"),
    "scheduler": (lambda t: put(t, 1, S, "scheduler", "state", "step"), "only in the checkpoint step"),
    "extra": (lambda t: put(t, [], "ranks", 0, "extra"), "extra must be a dict"),
    "generator": (lambda t: put(t, torch.zeros(5056).byte(), *R, "generators", "draws"), "draws.*must take its saved"),
    "its size": (lambda t: put(t, torch.zeros(3).byte(), *R, "torch"), "stream torch must take its saved state"),
    "python": (lambda t: put(t, (3, (1,), None), *R, "python"), "stream python must take its saved state"),
    "numpy": (lambda t: put(t, 10**6, *R, "numpy", "state", "pos"), "stream numpy must take .* position 1000000"),
    "no generator": (lambda t: without(t, *R, "generators", "draws"), "only in this run draws"),
    "ranks": (lambda t: t["ranks"].append(t["ranks"][0]), "as many processes as it was saved with, 2, got 1"),
    "position": (lambda t: put(t, None, "ranks", 0, "batches"), "batches must be there"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_state_changes_nothing(wrong):
    change, message = WRONG[wrong]
    tree = toy_run().advance(1).state.collect()
    change(tree)
    unchanged(toy_run(seed=1).advance(1), tree, f"^restore: .*{message}")


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_8bit_states_of_another_size_are_refused(library):
    """What the kernels would read past."""
    run = sd3_run(False, library)
    tree = run.advance(1).state.collect()
    states = tree["shared"]["optimizer"]["state_dict"]["state"]
    if library == "bitsandbytes":
        key = "__bnb_optimizer_quant_state__"
        state = next(s[key] for s in states.values() if "absmax1" in s[key])
        state["absmax1"] = state["absmax1"][:-1]
    else:
        state = next(s["exp_avg"] for s in states.values() if hasattr(s["exp_avg"], "codes"))
        state.scale = state.scale[:-1]
    with pytest.raises(ValueError, match=r"restore: optimizer.state of .* must be of shape \(\d+,\), got \(\d+,\)"):
        run.state.restore(tree)


SCALARS = st.none() | st.integers() | st.text(max_size=3) | st.just(torch.zeros(2)) | st.just({}) | st.just([])


@given(st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part_may_be_anything(data):
    """One place of the tree replaced: restored, or a ValueError; never another error."""
    tree = toy_run().advance(1).state.collect()
    node, key = tree, data.draw(st.sampled_from(sorted(tree)))
    while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 4)):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node, key=str) if isinstance(node, dict) else range(len(node))))
    assume(key not in ("batches", "at") or node is tree)  # the data's own to check
    node[key] = data.draw(SCALARS)
    try:
        toy_run(seed=1).state.restore(tree)
    except ValueError as error:
        assert str(error).startswith("restore: ")


def killed_again_and_again(folder, steps: int, kills: int, seed: int):
    """The final state of a run that writes after every step, killed at random moments and started anew."""
    moments, hits = random.Random(seed), 0
    for attempt in range(kills + 1):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run = toy_run(seed=attempt)
                latest = latest_checkpoint(folder)
                if latest is not None:
                    run.state.restore(read_checkpoint(latest))
                elif attempt:
                    run = toy_run()
                while run.progress["step"] < steps:
                    time.sleep(0.008)  # 30 steps a kill outlast it on any machine
                    write_checkpoint(folder, run.advance(1).progress["step"], run.state.collect(), keep=2)
                status = 0
            finally:
                os._exit(status)
        if hits < kills:
            time.sleep(moments.uniform(0.02, 0.2))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -9)
        hits += status == -9
        if status == 0:
            assert hits == kills, "the run was too short to be killed"
            return read_checkpoint(latest_checkpoint(folder))
    raise AssertionError("the run does not come to its end")


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, kills):
    expected = toy_run().advance(30 * kills).state.collect()
    found = killed_again_and_again(tmp_path, 30 * kills, kills, seed=kills)
    assert same(found, expected)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")]) == 2
