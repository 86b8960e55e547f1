"""`twinflow.attach`: exports inside stock pipelines draw what `sample()` draws with the student."""

import gc
import subprocess
import sys
import warnings

import huggingface_hub
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import StableDiffusion3AutoBlocks
from helpers.drawing import PROMPTS, arguments, draw, encoding, fresh, sampled, start
from helpers.export_cases import FAMILIES, lora_student, scrambled, stock_pipeline, whole_student
from helpers.tiny_pipelines import image_size, tiny_transformer
from PIL import Image

import twinflow
import twinflow.pipelines.attach as attach_module
from twinflow import EMATeacher
from twinflow.export import export
from twinflow.lora import add_lora
from twinflow.models import load
from twinflow.pipelines.time_hooks import SchedulerTimeHooks
from twinflow.scheduler import TwinFlowScheduler

# A matrix product of other batch or sequence lengths rounds otherwise; latents are of size 5.
CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", ["few", "any", "mul"])
@pytest.mark.parametrize("family", [*FAMILIES, "flux_guidance"])
def test_a_conditioned_lora_is_told_the_exact_times(family, style, tmp_path):
    student = lora_student(family)
    pipe = twinflow.attach(stock_pipeline(family), export(student, tmp_path), style=style)
    for walk in ({"steps": 1}, {"steps": 3}):
        wanted = sampled(student, pipe, family, style=style, **walk)
        torch.testing.assert_close(draw(pipe, family, **walk), wanted, **CLOSE)


@pytest.mark.parametrize("mode", [None, "midpoint", "sign", "midpoint+sign", "dual"])
def test_every_mode_and_option_arrives(mode, tmp_path):
    student = lora_student("sd3", mode)
    pipe = twinflow.attach(stock_pipeline("sd3"), export(student, tmp_path), style="any", order=2, gap_end=0.2)
    wanted = sampled(student, pipe, "sd3", 2, style="any", order=2, gap_end=0.2)
    torch.testing.assert_close(draw(pipe, "sd3", 2), wanted, **CLOSE)


@pytest.mark.parametrize("mode", [None, "midpoint+sign", "dual+sign"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_takes_the_transformer_s_place(family, mode, tmp_path):
    student = whole_student(family, mode)
    pipe = stock_pipeline(family)
    before = pipe.transformer
    twinflow.attach(pipe, export(student, tmp_path), style="any")
    assert pipe.transformer is not before and not pipe.transformer.training
    # Without conditioning the pipeline's own arithmetic of times counts, in Z-Image (1000 - t) / 1000.
    close = dict(rtol=1e-4, atol=1e-4) if mode is None else CLOSE
    torch.testing.assert_close(draw(pipe, family), sampled(student, pipe, family, style="any"), **close)


def test_averages_are_drawn_with(tmp_path):
    student = lora_student("sd3")
    teacher = EMATeacher(student, 0.9)
    teacher.update()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(2 if parameter.requires_grad else 1)
    teacher.update()
    pipe = twinflow.attach(stock_pipeline("sd3"), export(student, tmp_path, teacher=teacher))
    torch.testing.assert_close(draw(pipe, "sd3"), sampled(student, pipe, "sd3", network=teacher), **CLOSE)


@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
def test_a_bfloat16_pipeline_hears_float32_times(family, tmp_path):
    student = lora_student(family, "midpoint+sign")
    pipe = stock_pipeline(family)
    twinflow.attach(pipe.to(torch.bfloat16), export(student, tmp_path))
    heard = []
    embedder = student.time_embedder().path
    pipe.transformer.get_submodule(embedder).register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    draw(pipe, family, 1, latents=None)
    times = torch.full((1,), 0.999), torch.zeros(1)
    wanted = []
    student.network.get_submodule(embedder).register_forward_pre_hook(lambda _, args: wanted.append(args[0]))
    with torch.no_grad():
        student(torch.zeros(1, 16, 2, 2), *times, {"prompt_embeds": torch.zeros(1, 1, 16)})
    assert heard[0].dtype == torch.bfloat16 and torch.equal(heard[0][:1], wanted[0].bfloat16())


def test_a_style_lora_stays_active_beside_it(tmp_path):
    style = scrambled(add_lora(load(tiny_transformer("sd3")), 2, targets=("attn.to_q",), conditioning=None))
    export(style, tmp_path / "style")
    student = lora_student("sd3", base_lora=tmp_path / "style")
    export(student, tmp_path / "few_steps")
    pipe = stock_pipeline("sd3")
    pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
    twinflow.attach(pipe, tmp_path / "few_steps", adapter_name="fast")
    assert pipe.get_active_adapters() == ["style", "fast"]
    torch.testing.assert_close(draw(pipe, "sd3"), sampled(student, pipe, "sd3"), **CLOSE)


def test_times_are_unbound_after_a_call_and_after_a_failing_one(tmp_path):
    pipe = twinflow.attach(stock_pipeline("sd3"), export(lora_student("sd3"), tmp_path))
    conditioning = SchedulerTimeHooks.of(pipe.transformer).conditioning
    first = draw(pipe, "sd3")
    assert conditioning._current() is None
    block, broken = pipe.transformer.transformer_blocks, torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    pipe.transformer.transformer_blocks = broken
    with pytest.raises(TypeError):
        draw(pipe, "sd3")
    assert conditioning._current() is None
    pipe.transformer.transformer_blocks = block
    assert torch.equal(draw(pipe, "sd3"), first)


def test_another_scheduler(tmp_path):
    student = lora_student("sd3")
    pipe = twinflow.attach(stock_pipeline("sd3"), export(student, tmp_path))
    pipe.scheduler = TwinFlowScheduler.from_config(pipe.scheduler.config, style="any")
    torch.testing.assert_close(draw(pipe, "sd3"), sampled(student, pipe, "sd3", style="any"), **CLOSE)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="must be a TwinFlowScheduler, got none that asks for the timestep 1000"):
        pipe(PROMPTS, num_inference_steps=1, **arguments("sd3"))


def test_a_compiled_transformer(tmp_path):
    student = lora_student("sd3")
    pipe = twinflow.attach(stock_pipeline("sd3"), export(student, tmp_path), style="any")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    for steps in (1, 2, 4):
        wanted = sampled(student, pipe, "sd3", steps, style="any")
        torch.testing.assert_close(draw(pipe, "sd3", steps), wanted, **CLOSE)


def test_a_pipeline_made_from_it_outlives_it(tmp_path):
    pipe = twinflow.attach(stock_pipeline("sd3"), export(lora_student("sd3"), tmp_path))
    other = StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    del pipe
    gc.collect()
    height, width = image_size("sd3")
    image = Image.new("RGB", (width, height))
    options = dict(height=height, width=width, strength=0.5, num_inference_steps=4, guidance_scale=0.0)
    assert other("a fox", image=image, **options).images[0].size == (width, height)


GUIDED = {
    "qwen_image": dict(true_cfg_scale=4.0, negative_prompt="bad"), "sd3": dict(guidance_scale=7.0),
    "sana": dict(guidance_scale=4.5), "flux": dict(true_cfg_scale=4.0, negative_prompt="bad"),
    "flux_guidance": dict(true_cfg_scale=4.0, negative_prompt="bad"), "z_image": dict(guidance_scale=5.0),
}  # fmt: skip


@pytest.mark.parametrize("mode", [None, "dual"])
@pytest.mark.parametrize("family", GUIDED)
def test_guidance_warns_once(family, mode, tmp_path):
    pipe = twinflow.attach(stock_pipeline(family), export(lora_student(family, mode), tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            draw(pipe, family)
    guidance = {name: [value] * 2 if name == "negative_prompt" else value for name, value in GUIDED[family].items()}
    with pytest.warns(UserWarning, match=r"guidance must be off, .* has put guidance into the weights"):
        draw(pipe, family, **guidance)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe, family, **guidance)


def test_twinflow_imports_without_diffusers_and_peft():
    code = (
        "import sys; sys.modules['diffusers'] = sys.modules['peft'] = None\n"
        "import twinflow\n"
        "try: twinflow.attach\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "diffusers" in run.stdout


def test_an_export_on_the_hub(tmp_path, monkeypatch):
    student = lora_student("sd3")
    folder, asked = export(student, tmp_path), []
    monkeypatch.setattr(attach_module, "snapshot_download", lambda name, allow_patterns: asked.append(name) or folder)
    pipe = twinflow.attach(stock_pipeline("sd3"), "someone/few-step")
    torch.testing.assert_close(draw(pipe, "sd3"), sampled(student, pipe, "sd3"), **CLOSE)
    assert asked == ["someone/few-step"]
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="lora_or_dir must be a folder, a file, or a name on the hub, got 'no/one': "):
        twinflow.attach(stock_pipeline("sd3"), "no/one")


def test_a_modular_pipeline(tmp_path):
    """It draws what the stock pipeline draws, and gets its own parts back."""
    folder, stock = export(lora_student("sd3"), tmp_path), stock_pipeline("sd3")
    modular = StableDiffusion3AutoBlocks().init_pipeline()
    modular.update_components(**{n: part for n, part in stock.components.items() if n in modular.component_names})
    modular.guider.disable()
    own, (height, width) = modular.scheduler, image_size("sd3")
    call = dict(prompt=list(PROMPTS), latents=start("sd3"), num_inference_steps=2, output="images")
    call |= dict(output_type="latent", height=height, width=width, **encoding("sd3"))
    plain = modular(**call)
    assert twinflow.attach(modular, folder, style="any") is modular
    modular.scheduler.set_generator(fresh())
    drawn = modular(**call)
    assert twinflow.detach(modular).scheduler is own
    assert torch.equal(modular(**call), plain)
    wanted = draw(twinflow.attach(stock_pipeline("sd3"), folder, style="any"), "sd3")
    torch.testing.assert_close(drawn, wanted, **CLOSE)
