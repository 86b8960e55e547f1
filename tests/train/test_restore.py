"""What a run trained, read back from its folder."""

import json
import shutil

import pytest
import torch
from helpers.finished_runs import finished_run, kept_run
from helpers.tiny_pipelines import saved_pipeline

from twinflow.interface import trained_parameters
from twinflow.train.checkpoint.checkpoint import TENSORS, latest_checkpoint, read_checkpoint
from twinflow.train.restore import restore_run


def saved(run, number=2):
    return read_checkpoint(run / f"checkpoint-{number:06d}")["shared"]


def same(mine, theirs):
    assert mine.keys() == theirs.keys() and mine
    return all(torch.equal(value.detach(), theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("family", ["sd3", "qwen_image"])
def test_student_and_average_are_those_of_the_checkpoint(family):
    found, expected = restore_run(kept_run(family)), saved(kept_run(family))
    assert found.step == 2 and found.checkpoint == latest_checkpoint(kept_run(family)) and not found.complaints
    assert same(trained_parameters(found.student), expected["student"])
    assert same(found.teacher.parameters(), expected["teacher"]["state"]["shadow"])
    assert not same(trained_parameters(found.student), expected["teacher"]["state"]["shadow"])
    assert (found.teacher.updates, found.usage.steps) == (2, 2)


def test_all_weights_of_a_full_run(tmp_path):
    found = restore_run(finished_run(tmp_path, model_type="full", steps=1))
    assert same(trained_parameters(found.student), saved(tmp_path, 1)["student"])
    assert same(found.teacher.parameters(), saved(tmp_path, 1)["teacher"]["state"]["shadow"])


def test_an_earlier_checkpoint_by_name_and_by_path_without_the_average():
    run = kept_run()
    for asked in ("checkpoint-000001", "checkpoint-1", run / "checkpoint-000001"):
        found = restore_run(run, checkpoint=asked, ema=False)
        assert found.step == 1 and found.teacher is None
        assert same(trained_parameters(found.student), saved(run, 1)["student"])


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    run = shutil.copytree(kept_run(), tmp_path / "run")
    with open(run / "checkpoint-000002" / TENSORS, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x99")
    found = restore_run(run)
    assert found.step == 1 and "checkpoint-000002 is passed over" in found.complaints[0]
    with pytest.raises(ValueError, match="must have the bytes that were written, got others"):
        restore_run(run, checkpoint="checkpoint-000002")
    shutil.rmtree(run / "checkpoint-000001")
    with pytest.raises(ValueError, match="run must have a whole checkpoint, got checkpoint-000002 is passed over"):
        restore_run(run)


def test_a_run_without_an_average(tmp_path):
    run = finished_run(tmp_path, steps=1, use_ema=False, twinflow_allow_no_ema_teacher=True)
    assert restore_run(run).teacher is None
    with pytest.raises(ValueError, match="ema must be False for a run without an average"):
        restore_run(run, ema=True)


def test_another_place_for_the_pipeline(tmp_path):
    run = shutil.copytree(kept_run(), tmp_path / "run")
    change(run, pretrained_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="must be a folder that exists or a hub name"):
        restore_run(run)
    found = restore_run(run, model=str(saved_pipeline("sd3")))
    assert same(trained_parameters(found.student), saved(run)["student"])
    assert found.usage.model == str(saved_pipeline("sd3"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_rank": 3}, "must be of shape .* another model or rank"),
        ({"conditioning": "sign"}, "student must have the names that were saved, got a difference"),
        ({"pretrained_model_name_or_path": str(saved_pipeline("qwen_image"))}, "student must have the names"),
        ({"model_family": "flux"}, "model_family must be sd3"),
        ({"lora_rank": "many"}, "lora_rank must be an integer"),
    ],
)
def test_a_config_of_another_run_is_refused(tmp_path, changes, message):
    run = shutil.copytree(kept_run(), tmp_path / "run")
    change(run, **changes)
    with pytest.raises(ValueError, match=message):
        restore_run(run)


def change(run, **changes):
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_a_checkpoint_of_another_dtype_is_refused(tmp_path, part):
    from twinflow.train.checkpoint.checkpoint import write_checkpoint

    run = shutil.copytree(kept_run(), tmp_path / "run")
    tree = read_checkpoint(run / "checkpoint-000002")
    weights = tree["shared"]["student"] if part == "student" else tree["shared"]["teacher"]["state"]["shadow"]
    name = next(iter(weights))
    weights[name] = weights[name].to(torch.float16)
    write_checkpoint(run, 3, tree)
    with pytest.raises(ValueError, match=rf"restore: {part}.* must be torch.float32, got torch.float16"):
        restore_run(run)
