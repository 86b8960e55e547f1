"""ComfyUI's key names, read back by the converters of stock diffusers, which know them too."""

import pytest
import torch
from helpers.export_cases import lora_student, stock_pipeline, velocity, whole_student
from safetensors.torch import load_file

from twinflow.export import export
from twinflow.formats.manifest import COMFYUI_LORA, COMFYUI_MODEL, CONDITIONING, MANIFEST
from twinflow.models import load

FAMILIES = ("qwen_image", "z_image")
SECOND = {"qwen_image": "time_text_embed_2.timestep_embedder.linear_1", "z_image": "t_embedder_2.mlp.0"}
# The whole of Z-Image in ComfyUI: once, and in each block.
Z_IMAGE = {
    "x_embedder.weight", "x_embedder.bias", "x_pad_token", "cap_pad_token", "cap_embedder.0.weight",
    "cap_embedder.1.weight", "cap_embedder.1.bias", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias",
    "t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias", "final_layer.linear.weight", "final_layer.linear.bias",
    "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias",
}  # fmt: skip
Z_IMAGE_BLOCK = {
    "attention.qkv.weight", "attention.out.weight", "attention.q_norm.weight", "attention.k_norm.weight",
    "attention_norm1.weight", "attention_norm2.weight", "ffn_norm1.weight", "ffn_norm2.weight",
    "feed_forward.w1.weight", "feed_forward.w2.weight", "feed_forward.w3.weight",
}  # fmt: skip
MODULATION = {"adaLN_modulation.0.weight", "adaLN_modulation.0.bias"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_s_names_and_scaling(family, tmp_path):
    student = lora_student(family, "midpoint+sign")  # rank 4, scaling 1.5
    export(student, tmp_path, format="comfyui")
    tensors = load_file(tmp_path / COMFYUI_LORA)
    layers = {name.rpartition(".lora_A")[0] for name, _ in student.network.named_parameters() if "lora_A" in name}
    endings = ("lora_down.weight", "lora_up.weight", "alpha")
    assert tensors.keys() == {f"diffusion_model.{layer}.{ending}" for layer in layers for ending in endings}
    assert all(value.item() == 6.0 for name, value in tensors.items() if name.endswith(".alpha"))
    assert {path.name for path in tmp_path.iterdir()} == {COMFYUI_LORA, MANIFEST}  # no sign table: nothing asks it


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_computes_what_the_student_computes(family, tmp_path):
    student = lora_student(family, None)
    export(student, tmp_path, format="comfyui")
    pipe = stock_pipeline(family)
    pipe.load_lora_weights(tmp_path / COMFYUI_LORA)
    torch.testing.assert_close(velocity(load(pipe.transformer), family), velocity(student, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_embedder_lies_beside_a_lora_and_stock_diffusers_refuses_it(family, tmp_path):
    export(lora_student(family), tmp_path, format="comfyui")
    beside = load_file(tmp_path / CONDITIONING)
    assert f"{SECOND[family]}.weight" in beside and not any("sign" in name for name in beside)
    with pytest.raises(ValueError, match=r"call twinflow\.attach\(pipe, folder\)"):
        stock_pipeline(family).load_lora_weights(tmp_path / COMFYUI_LORA)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_computes_what_the_student_computes(family, tmp_path):
    student = whole_student(family, None)
    export(student, tmp_path, format="comfyui")
    student.network.save_config(tmp_path / "config")
    network = type(student.network).from_single_file(tmp_path / COMFYUI_MODEL, config=str(tmp_path / "config"))
    assert torch.equal(velocity(load(network), family), velocity(student, family))


def test_a_whole_model_s_names(tmp_path):
    export(whole_student("z_image"), tmp_path / "z_image", format="comfyui")
    blocks = {"layers.0": MODULATION, "layers.1": MODULATION, "noise_refiner.0": MODULATION, "context_refiner.0": set()}
    names = {f"{block}.{name}" for block, more in blocks.items() for name in Z_IMAGE_BLOCK | more}
    second = {f"t_embedder_2.mlp.{layer}.{what}" for layer in (0, 2) for what in ("weight", "bias")}
    assert load_file(tmp_path / "z_image" / COMFYUI_MODEL).keys() == names | Z_IMAGE | second

    student = whole_student("qwen_image")
    export(student, tmp_path / "qwen_image", format="comfyui")
    names = set(student.network.state_dict()) - {"time_sign_embed.weight"}
    assert load_file(tmp_path / "qwen_image" / COMFYUI_MODEL).keys() == names
    assert f"{SECOND['qwen_image']}.weight" in names
