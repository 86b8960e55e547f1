"""An attached LoRA draws the same however the pipeline is placed, before or after `attach`."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers.drawing import draw
from helpers.export_cases import lora_student, stock_pipeline, whole_student

import twinflow
from twinflow.conditioning import plain_copy
from twinflow.export import export

CPU = torch.device("cpu")
PLACES = {
    "group offload, leaves": lambda net: net.enable_group_offload(CPU, CPU, offload_type="leaf_level"),
    "group offload, blocks": lambda net: net.enable_group_offload(
        CPU, CPU, offload_type="block_level", num_blocks_per_group=1
    ),
    "layerwise casting": lambda net: net.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
}


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    return export(lora_student("sd3", "dual+sign"), tmp_path_factory.mktemp("exports") / "dual")


@pytest.fixture(scope="module")
def wanted(dual):
    return draw(twinflow.attach(stock_pipeline("sd3"), dual), "sd3")


@pytest.mark.parametrize(
    ("place", "first"),
    [(place, first) for place in PLACES for first in ("placed", "attached")
     if (place, first) != ("layerwise casting", "attached")],  # peft's own LoRA layers compute in 8 bits then
)  # fmt: skip
def test_the_picture_is_the_same(place, first, dual, wanted):
    pipe = stock_pipeline("sd3")
    if first == "attached":
        twinflow.attach(pipe, dual)
    PLACES[place](pipe.transformer)
    if first == "placed":
        twinflow.attach(pipe, dual)
    image = draw(pipe, "sd3")
    if place == "layerwise casting":  # weights in 8 bits: near, and finite
        assert image.isfinite().all() and (image - wanted).norm() < 0.5 * wanted.norm()
    else:
        torch.testing.assert_close(image, wanted, rtol=1e-4, atol=1e-4)


def test_an_embedder_is_built_anew_from_what_offloading_keeps():
    """On a sequentially offloaded transformer the live weights are on `meta`."""
    first = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 8))
    values = {name: value.clone() for name, value in first.state_dict().items()}
    for layer in (first[0], first[2]):
        kept = {name: value.clone() for name, value in layer.state_dict().items()}
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", weights_map=kept))
        layer.to("meta")
    second = plain_copy(first)
    assert not any(hasattr(module, "_hf_hook") for module in second.modules())
    for name, value in second.state_dict().items():
        assert torch.equal(value, values[name])


WHOLE = {
    "groups": lambda pipe: pipe.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level"),
    "compiled in place": lambda pipe: pipe.transformer.compile(backend="eager"),
    "compiled": lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer, backend="eager")),
}


@pytest.mark.parametrize("place", WHOLE)
def test_a_whole_model_stays_placed_as_the_one_it_replaces(place, tmp_path):
    folder = export(whole_student("sd3", "dual"), tmp_path)
    wanted = draw(twinflow.attach(stock_pipeline("sd3"), folder), "sd3", 1)
    pipe = stock_pipeline("sd3")
    WHOLE[place](pipe)
    before = pipe.transformer
    twinflow.attach(pipe, folder)
    assert pipe.transformer is before
    torch.testing.assert_close(draw(pipe, "sd3", 1), wanted, rtol=1e-4, atol=1e-4)


def test_a_whole_model_for_a_transformer_in_eight_bits_is_refused(tmp_path):
    pipe = stock_pipeline("sd3")
    PLACES["layerwise casting"](pipe.transformer)
    with pytest.raises(
        ValueError, match="got one that is compiled, offloaded or cast; attach to a pipeline as it comes"
    ):
        twinflow.attach(pipe, export(whole_student("sd3", None), tmp_path))
