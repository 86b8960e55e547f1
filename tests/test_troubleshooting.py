"""The troubleshooting table: each row quotes what is said where the trouble is real."""

import re
from pathlib import Path

import httpx
import pytest
from helpers.tiny_pipelines import saved_pipeline
from helpers.training_cases import quiet, settings
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from twinflow import EMATeacher
from twinflow.lora import add_lora
from twinflow.models import load
from twinflow.train import read_config
from twinflow.train.logging.step_metrics import require_finite
from twinflow.train.model import pipeline_source as source
from twinflow.train.run import train

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md").read_text()
ROWS = re.findall(r"^\| `(.+?)` \| (?!---)", PAGE, re.MULTILINE)
GATED = "stabilityai/stable-diffusion-3.5-medium"
ON = {"pretrained_model_name_or_path": "a/b", "twinflow_enabled": True}


def no_flow(folder):
    read_config(None, ON | {"model_family": "sdxl", "use_ema": True})


def no_average(folder):
    read_config(None, ON)


def flat(folder):
    raise ValueError(*read_config(None, ON | {"use_ema": True}).warnings)


def drift(folder):
    """A second LoRA, trained in the first one's place, which the teacher does not follow."""
    student = add_lora(load(saved_pipeline("sd3")), 2)
    teacher = EMATeacher(student, 0.9)
    add_lora(student, 2, adapter="second")
    teacher.check(student)


def not_finite(folder):
    record = {"step": 3, "loss": float("nan"), "terms": {}, "grad_norm": 1.0}
    require_finite([{"step": 2, "loss": 1.0, "terms": {"rcgm": 1.0}, "grad_norm": 1.0}, record])


def gated(folder):
    """The hub's own errors; nothing is asked of it."""
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))

    def download(name: str) -> str:
        try:
            raise GatedRepoError("403", response=response)
        except GatedRepoError as error:
            raise OSError("diffusers says more") from error

    source._downloaded(GATED, download)


def changed(folder):
    train(settings(folder, max_train_steps=1), quiet())
    train(settings(folder, max_train_steps=2, seed=1), quiet())


CAUSES = (no_flow, no_average, flat, drift, not_finite, gated, changed)


def test_every_row_has_its_cause():
    assert len(ROWS) == len(CAUSES)


@pytest.mark.parametrize("row", range(len(CAUSES)))
def test_what_a_row_quotes_is_said(tmp_path, row):
    with pytest.raises((ValueError, FloatingPointError)) as raised:
        CAUSES[row](tmp_path)
    assert ROWS[row] in str(raised.value)


def test_other_ways_of_the_hub():
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))

    def missing(name: str) -> str:
        raise RepositoryNotFoundError("404", response=response)

    def offline(name: str) -> str:
        raise ConnectionError("no route to host")

    def ours(name: str) -> str:
        raise KeyError("a bug")

    with pytest.raises(
        ValueError, match=r"a model that exists, got 'some/model': see https://huggingface.co/some/model"
    ):
        source._downloaded("some/model", missing)
    with pytest.raises(ValueError, match=r"no way to it: no route to host; give the folder of a copy"):
        source._downloaded("some/model", offline)
    with pytest.raises(KeyError):
        source._downloaded("some/model", ours)
    for name, wanted in (("nowhere", "owner/name"), ("./a/b", "folder that exists"), (__file__, "got the file")):
        with pytest.raises(ValueError, match=wanted):
            source.pipeline_folder(name)
    with pytest.raises(ValueError, match=r"a diffusers pipeline, got .* without model_index.json"):
        source.pipeline_folder(str(Path(__file__).parent))
