"""Samples and the validation loss of two ranks are those of one process, and training goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.ranked_steps import CONFIG, Run, on_two_ranks
from helpers.validation_cases import CPU, cached, drawn, encoded, sampler_of, settings_for

from twinflow.distributed import world
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.validation.eval_mode import eval_mode
from twinflow.train.validation.loss import Evaluation


def looked_at(accelerator: Accelerator, folder: Path) -> None:
    """A run that is looked at between its steps; each rank writes what it found."""
    settings = settings_for(folder, "sd3", memory_preset="batch", ema_decay=0.9)
    run = Run(settings, accelerator)
    run.teacher.update()
    with eval_mode(run.student, CPU) as plain:  # DDP broadcasts buffers in every call, and ranks call unequally often
        assert plain is run.model
    watched = Evaluation(CONFIG, cached("sd3"), cached("sd3").entries[:5], device=CPU)
    sampler = sampler_of(settings, encoded("sd3"))
    found = [watched.run(run.student, run.teacher)]
    said = [sampler.draw(1, run.student, run.teacher), sampler.draw(2, run.student)]
    run.advance(1)
    found.append(watched.run(run.student, run.teacher))
    sampler.draw(3, run.student, run.teacher)
    run.advance(1)
    told = {"found": found, "said": said, "losses": run.extra["losses"], "norms": run.extra["norms"]}
    (folder / f"{world()[0]}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("alone")
    looked_at(Accelerator(cpu=True), folder)
    AcceleratorState._reset_state(reset_partial_state=True)  # forks would take it for their own
    return json.loads((folder / "0.json").read_text()), folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_find_what_one_process_finds(kind, alone, tmp_path):
    on_two_ranks(kind, looked_at, tmp_path)
    expected, folder = alone
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0]["found"] == told[1]["found"] and told[0]["said"] == told[1]["said"]
    for mine, theirs in zip(told[0]["found"], expected["found"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["terms"] == pytest.approx(theirs["terms"], rel=1e-4)
    assert np.mean([t["losses"] for t in told], 0) == pytest.approx(expected["losses"], rel=1e-4)
    assert told[0]["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    for step in (1, 2, 3):
        images, wanted = (drawn(settings_for(f), step)[1] for f in (tmp_path, folder))
        assert all(np.abs(images[key].astype(int) - wanted[key]).max() <= 1 for key in wanted)
    samples = RunFolder(settings_for(tmp_path).output_dir).samples
    assert sorted(path.name for path in samples.iterdir()) == ["step-000001", "step-000002", "step-000003"]


def raises(accelerator: Accelerator, folder: Path) -> None:
    settings = settings_for(folder, memory_preset="batch")
    (folder / "run").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"output_dir must take 6 images|rank 0 failed with .*must take 6 images"):
        sampler_of(settings, encoded("sd3")).draw(1, Run(settings, accelerator).student)


def test_a_failure_to_write_is_raised_on_every_rank(tmp_path):
    encoded("sd3")
    on_two_ranks("ddp", raises, tmp_path)
