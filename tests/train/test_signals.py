"""What a signal finds a run doing: encoding, drawing, checking; and what stays of a run that goes on otherwise."""

import os
import signal

import pytest
import torch
from helpers.tiny_pipelines import saved_pipeline
from helpers.training_cases import quiet, settings, weights

from twinflow.train import read_config
from twinflow.train.logging.console import Display
from twinflow.train.model.student import build_student
from twinflow.train.run import TrainingStopped, train
from twinflow.train.setup import autocast
from twinflow.train.validation.loss import Evaluation
from twinflow.train.validation.samples import Sampler


def signalled(monkeypatch, owner: type, name: str) -> None:
    """The process gets SIGTERM the first time that a method has been called."""
    method, sent = getattr(owner, name), []

    def called(self, *arguments, **more):
        found = method(self, *arguments, **more)
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return found

    monkeypatch.setattr(owner, name, called)


def test_sigterm_while_encoding(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        signalled(patched, Display, "caching")
        with pytest.raises(TrainingStopped, match=r"stopped before its steps; the same command goes on"):
            train(settings(tmp_path, max_train_steps=1), quiet())
    assert signal.getsignal(signal.SIGTERM) is before
    assert train(settings(tmp_path, max_train_steps=1), quiet()) == 1


@pytest.mark.parametrize("owner, name", [(Sampler, "_walk"), (Evaluation, "run")])
def test_sigterm_between_steps_saves_and_leaves_the_rest(tmp_path, monkeypatch, owner, name):
    """After the first of twelve images, or the validation loss that comes before them."""
    run = settings(tmp_path, max_train_steps=50, validation_steps=3, eval_steps=3, eval_share=0.3,
                   checkpointing_steps=0, disable_benchmark=True)  # fmt: skip
    signalled(monkeypatch, owner, name)
    console = quiet()
    assert train(run, console) == 3
    assert weights(run.output_dir)[0] == 3
    assert "stopped by SIGTERM after step 3: saved" in console.export_text()
    assert not (run.output_dir / "samples").exists()


@pytest.mark.parametrize(
    "first, then, kind", [("rows", "24gb", "torch.AdamW"), ("24gb", "rows", "bitsandbytes.AdamW8bit")]
)
def test_another_preset_keeps_the_optimizer(tmp_path, first, then, kind):
    """`24gb` counts on 8-bit AdamW where a run begins; its state goes on under every preset."""
    for step, preset in ((1, first), (2, then)):
        assert train(settings(tmp_path, max_train_steps=step, memory_preset=preset), quiet()) == step
        assert weights(tmp_path / "run")[1]["optimizer"]["kind"] == kind


def test_a_unet_that_is_not_named_as_one():
    known = {"pretrained_model_name_or_path": str(saved_pipeline("sd15")), "use_ema": True}
    with pytest.raises(ValueError, match=r"^TwinFlow requires flow-matching prediction_type. Enable diff2flow_enabled"):
        build_student(read_config(None, known | {"twinflow_enabled": True}), saved_pipeline("sd15"))
    with pytest.raises(ValueError, match=r"^train: diff2flow_enabled must be true"):
        build_student(read_config(None, known), saved_pipeline("sd15"))


def test_whole_weights_compute_in_bfloat16(tmp_path):
    matrix = torch.ones(2, 2)
    for kind, dtype in (("full", torch.bfloat16), ("lora", torch.float32)):
        with autocast(settings(tmp_path, model_type=kind), torch.device("cpu")):
            assert (matrix @ matrix).dtype == dtype
