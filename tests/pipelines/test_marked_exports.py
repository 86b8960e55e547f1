"""A `dual` LoRA file loaded without `attach`, or swapped for another under its name, is noticed."""

import pytest
import torch
from helpers.drawing import draw
from helpers.export_cases import lora_student, stock_pipeline
from safetensors.torch import load_file

import twinflow
from twinflow.errors import ArgumentError
from twinflow.export import export
from twinflow.formats.manifest import LORA, marked, read_tensors, unmarked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("exports")
    export(lora_student("sd3", "dual"), found / "dual")
    export(lora_student("sd3", None), found / "plain")
    return found


@pytest.mark.parametrize("family", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_every_other_way_of_loading_is_noticed(tmp_path, family):
    export(lora_student(family, "dual"), tmp_path / "dual")
    export(lora_student(family, None), tmp_path / "plain")
    weights = load_file(tmp_path / "dual" / LORA)
    with pytest.raises(ValueError, match=r"second time embedder: call twinflow\.attach"):
        stock_pipeline(family).load_lora_weights(tmp_path / "dual")
    with pytest.raises(RuntimeError, match="size mismatch"):
        stock_pipeline(family).load_lora_weights(dict(weights))
    pipe = stock_pipeline(family)
    pipe.load_lora_weights(tmp_path / "plain", adapter_name="a")
    with pytest.raises(RuntimeError, match="call_twinflow_attach"):
        pipe.load_lora_weights(dict(weights), adapter_name="a", hotswap=True)


def test_weights_swapped_under_its_name_are_noticed(folder):
    pipe = twinflow.attach(stock_pipeline("sd3"), folder / "dual")
    draw(pipe, "sd3")
    weights = {name: value.flip(0) for name, value in load_file(folder / "plain" / LORA).items()}
    pipe.load_lora_weights(weights, adapter_name="twinflow", hotswap=True)
    with pytest.raises(ArgumentError, match="adapter 'twinflow' must have the weights that were attached, got others"):
        draw(pipe, "sd3")


def test_marks_come_off(folder):
    tensors = read_tensors(folder / "plain" / LORA)
    again = unmarked(marked(tensors))
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], value) for n, value in tensors.items())
    assert unmarked(tensors) is tensors
