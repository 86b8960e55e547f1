"""A dry run of a published model that is not on this machine."""

import pytest
from helpers.training_cases import CONFIG, quiet

from twinflow.errors import ArgumentError
from twinflow.train import dry_run as module
from twinflow.train import read_config
from twinflow.train.model.memory import workload_of_published


@pytest.fixture
def nowhere(monkeypatch):
    def configurations(name):
        raise ArgumentError("train", "pretrained_model_name_or_path", "a model that is here", name)

    monkeypatch.setattr(module, "configurations", configurations)


def test_the_planner_knows_published_models(nowhere, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "_forecast", lambda settings, workload, console, say: asked.append(workload()))
    console = quiet()
    module.dry_run(read_config(None, CONFIG), console)
    assert "forecast by the published architecture of sd3.5-large" in console.export_text()
    (workload,) = asked
    assert (workload.architecture.name, workload.lora_rank, workload.batch) == ("sd3.5-large", 64, 1)
    full = workload_of_published(read_config(None, CONFIG | {"model_type": "full", "optimizer": "radam"}))
    assert (full.lora_rank, full.base, full.optimizer) == (None, "float32", "adamw")


def test_a_model_that_nobody_knows(nowhere):
    console = quiet()
    module.dry_run(read_config(None, CONFIG | {"pretrained_model_name_or_path": "some/model"}), console)
    assert "no forecast: pretrained_model_name_or_path must be a model that is here" in console.export_text()
