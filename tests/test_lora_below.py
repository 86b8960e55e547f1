"""What is on a transformer before `add_lora`: adapters that draw stay, frozen; files of other trainers are read."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.export_cases import lora_student, scrambled, stock_pipeline, velocity
from helpers.tiny_pipelines import tiny_transformer
from helpers.tiny_unet import sd15_scheduler
from peft import LoHaConfig
from safetensors.torch import load_file, save_file

from twinflow import EMATeacher, FrozenTeacher
from twinflow.export import export
from twinflow.formats.manifest import LORA
from twinflow.lora import add_lora
from twinflow.models import load


@pytest.fixture
def style(tmp_path):
    return export(lora_student("sd3", None, targets=("attn.to_q", "attn.to_k")), tmp_path / "style")


def styled(folder, scale=0.5):
    pipe = stock_pipeline("sd3")
    pipe.load_lora_weights(folder, adapter_name="style")
    pipe.set_adapters("style", scale)
    return pipe


def drawn(network, family="sd3"):
    return velocity(load(network), family)


def test_an_active_style_stays_under_student_and_teachers(style, caplog):
    """With the scale that the user set; on layers that the new LoRA has and on those that it has not."""
    pipe = styled(style)
    expected, bare = drawn(pipe.transformer), drawn(tiny_transformer("sd3"))
    with caplog.at_level("INFO", "twinflow"):
        student = add_lora(load(pipe.transformer), 2, targets=("attn.to_q", "attn.to_v"))
    assert "on top of the active adapters style, which stay frozen" in caplog.text
    ema, frozen = EMATeacher(student, 0.9), FrozenTeacher(student)
    assert (expected - bare).abs().max() > 1e-2
    weights = {name: p.clone() for name, p in student.named_parameters() if ".style." in name}
    assert weights and not any(student.get_parameter(name).requires_grad for name in weights)
    for network in (student, _as_student(ema, student), _as_student(frozen, student)):
        torch.testing.assert_close(velocity(network, "sd3"), expected, atol=1e-4, rtol=1e-4)
    scrambled(student)
    assert (velocity(student, "sd3") - expected).abs().max() > 1e-2
    torch.testing.assert_close(velocity(_as_student(frozen, student), "sd3"), expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(student.get_parameter(name), value) for name, value in weights.items())


class _as_student:
    """A teacher with the attribute by which `velocity` makes a condition."""

    def __init__(self, teacher, student):
        self._teacher, self.condition_widths = teacher, student.condition_widths

    def __call__(self, *inputs):
        return self._teacher(*inputs)


def test_a_style_that_is_switched_off_stays_off_and_the_new_lora_is_on(style):
    pipe = styled(style)
    pipe.disable_lora()
    student = add_lora(load(pipe.transformer), 2, conditioning=None)
    torch.testing.assert_close(velocity(student, "sd3"), drawn(tiny_transformer("sd3")))
    before = velocity(student, "sd3")
    scrambled(student)
    assert (velocity(student, "sd3") - before).abs().max() > 1e-2
    assert not any(getattr(m, "disable_adapters", False) is True for m in student.modules())


def test_a_style_that_is_merged_into_the_export(style, tmp_path):
    pipe = styled(style)
    student = scrambled(add_lora(load(pipe.transformer), 2, conditioning="midpoint"))
    export(student, tmp_path / "both", merge_base=True)
    network = stock_pipeline("sd3")
    network.load_lora_weights(tmp_path / "both")
    merged = load(network.transformer, conditioning="midpoint")
    torch.testing.assert_close(velocity(merged, "sd3"), velocity(student, "sd3"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how, message", [
    ("fused", r"add_lora: adapters \['style'\] must be apart from the base, got fused; call unfuse_lora\(\)"),
    ("no LoRA", "add_lora: adapter 'style' must be a LoRA, got LOHA"),
])  # fmt: skip
def test_what_cannot_lie_below_is_named(how, message, style):
    if how == "fused":
        pipe = styled(style)
        pipe.fuse_lora()
        network = pipe.transformer
    else:
        network = tiny_transformer("sd3")
        network.add_adapter(LoHaConfig(r=2, target_modules=["to_q"]), "style")
    student = load(network)
    with pytest.raises(ValueError, match=message):
        add_lora(student, 2)
    assert student.conditioning is None and set(network.peft_config) == {"style"}


def kohya(name, value):
    layer, _, place = name.rpartition(".lora_")
    layer = layer.partition(".")[2]
    return f"lora_unet_{layer.replace('.', '_')}.lora_{'down' if place[0] == 'A' else 'up'}.weight", value


def comfyui(name, value):
    return name.replace("transformer.", "diffusion_model.", 1), value


def plain(name, value):
    return name, value


def student_of(network):
    if not isinstance(network, UNet2DConditionModel):
        return load(network)
    allowed = dict(diff2flow_enabled=True, twinflow_allow_diff2flow=True)
    return load(network, alphas_cumprod=sd15_scheduler("epsilon").alphas_cumprod, prediction_type="epsilon", **allowed)


@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("family, rename, targets", [
    ("qwen_image", comfyui, ("attn.to_q",)),
    ("qwen_image", kohya, ("attn.to_q",)),
    ("flux", plain, ("attn.to_q",)),
    ("z_image", comfyui, ("attention.to_q",)),
    ("sd15", kohya, ("attn1.to_q",)),
])  # fmt: skip
def test_a_style_file_of_another_trainer_is_read_as_the_pipeline_reads_it(family, rename, targets, alpha, tmp_path):
    """Scaling included: alpha 8 of rank 4 in a tensor beside the weights."""
    student = student_of(tiny_transformer(family))
    bare = velocity(student, family)
    export(scrambled(add_lora(student, 4, targets=targets, conditioning=None)), tmp_path / "own")
    tensors = dict(rename(*item) for item in load_file(tmp_path / "own" / LORA).items())
    if alpha is not None:
        layers = {name.rpartition(".lora_")[0] for name in tensors}
        tensors |= {f"{layer}.alpha": torch.tensor(alpha) for layer in layers}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "style.safetensors")
    pipe = stock_pipeline(family)
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors")
    expected = velocity(student_of(pipe.unet if family == "sd15" else pipe.transformer), family)
    styled = add_lora(
        student_of(tiny_transformer(family)), 2, base_lora=tmp_path / "style.safetensors", conditioning=None
    )
    assert (expected - bare).abs().max() > 1e-3
    torch.testing.assert_close(velocity(styled, family), expected, atol=1e-6, rtol=1e-5)
