"""A family defined in this file alone: one subclass and one line, then everything that other families do."""

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel
from helpers.tiny_pipelines import saved_pipeline, tiny_transformer
from helpers.training_cases import quiet, settings

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss, attach
from twinflow.cli import main
from twinflow.conditioning import MODES, TimeEmbedder
from twinflow.export import export
from twinflow.formats.manifest import CONDITIONING, read_manifest, read_names
from twinflow.lora import add_lora, load_lora
from twinflow.memory import PRESETS
from twinflow.memory.planner.forecast import Planner
from twinflow.memory.planner.workload import workload_of
from twinflow.models import FlowModel, load, register
from twinflow.models.autoencoders import Autoencoder
from twinflow.models.base import Published
from twinflow.models.registry import REGISTRATIONS
from twinflow.pipelines.generator import ImageGenerator
from twinflow.sampling import sample
from twinflow.train.run import train


class ToyTransformer2DModel(SD3Transformer2DModel):
    """A transformer that no family knows; diffusers has it while a test runs."""


ToyTransformer2DModel.__module__ = "diffusers.models"


class ToyAutoencoderKL(AutoencoderKL):
    """An autoencoder whose latents are scaled by half as much again."""


ToyAutoencoderKL.__module__ = "diffusers.models"


class HalfScaled(Autoencoder):
    class_name = "ToyAutoencoderKL"

    @classmethod
    def encode(cls, vae, pixels):
        return 1.5 * super().encode(vae, pixels)

    @classmethod
    def decode(cls, vae, latents):
        return super().decode(vae, latents / 1.5)


class ToyModel(FlowModel):
    """F(x_t, t, r, cond) of a ToyTransformer2DModel."""

    family = "toy"
    transformer_class = "ToyTransformer2DModel"
    pipeline_class = "StableDiffusion3Pipeline"
    second_embedder = "clock_2.embedder"
    lora_targets = ("attn.to_q", "attn.to_v")
    autoencoder = HalfScaled
    block_lists = (("num_layers", "transformer_blocks"),)
    published = (Published("toy-2", dict(num_layers=2, num_attention_heads=2, attention_head_dim=16,
                                         caption_projection_dim=32, pos_embed_max_size=64),
                           latent_channels=16, text_tokens=16, lora_rank=4, text_encoder_gb=0.1),)  # fmt: skip

    def time_embedder(self):
        return TimeEmbedder("time_text_embed.timestep_embedder", self.second_embedder)

    def condition_widths(self):
        config = self.config
        return {"prompt_embeds": config.joint_attention_dim, "pooled_prompt_embeds": config.pooled_projection_dim}

    def velocity(self, x_t, t, cond, lengths):
        return self.transformer(
            hidden_states=x_t, timestep=t * 1000, encoder_hidden_states=cond["prompt_embeds"].to(x_t.dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(x_t.dtype), return_dict=False,
        )[0]  # fmt: skip

    def encode_prompt(self, pipe, prompts, **options):
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **options)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """Registers the family, and takes it out again."""
    for cls in (ToyTransformer2DModel, ToyAutoencoderKL):
        monkeypatch.setattr(diffusers, cls.__name__, cls, raising=False)
    register(ToyModel, aliases=("toy-image",))
    yield
    del REGISTRATIONS["toy"]


def transformer() -> ToyTransformer2DModel:
    """Tiny, with the weights of the tests' SD3."""
    stock = tiny_transformer("sd3")
    network = ToyTransformer2DModel.from_config(stock.config)
    network.load_state_dict(stock.state_dict())
    return network


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pipeline of the family on disk."""
    pipe = DiffusionPipeline.from_pretrained(saved_pipeline("sd3"))
    vae = ToyAutoencoderKL.from_config(pipe.vae.config)
    vae.load_state_dict(pipe.vae.state_dict())
    pipe.register_modules(transformer=transformer(), vae=vae)
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def condition(rows: int) -> dict[str, torch.Tensor]:
    config = tiny_transformer("sd3").config
    return {"prompt_embeds": torch.randn(rows, 5, config.joint_attention_dim),
            "pooled_prompt_embeds": torch.randn(rows, config.pooled_projection_dim)}  # fmt: skip


@torch.no_grad()
def scramble(student: FlowModel) -> None:
    """Gives everything trainable weights that matter."""
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_with_every_conditioning(mode):
    student = add_lora(load(transformer()), 2, conditioning=mode)
    scramble(student)
    assert student.family == "toy" and ("clock_2" in student.conditioning.names) == ("dual" in mode)
    x, cond = torch.randn(4, 16, 8, 8), condition(4)
    criterion = TwinFlowLoss(TwinFlowConfig(enhanced_ratio=0.5))
    criterion.backward(student, x, cond, condition(1), teacher=EMATeacher(student, 0.9))
    trained = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in trained.values())
    assert any("clock_2" in name for name in trained) == ("dual" in mode)


def test_an_export_keeps_a_second_embedder_of_any_name(tmp_path, folder):
    student = add_lora(load(folder), 2, conditioning="dual+sign")
    scramble(student)
    saved = export(student, tmp_path / "export")
    assert read_manifest(saved).family == "toy"
    names = {name.partition(".")[0] for name in read_names(saved / CONDITIONING)}
    assert names == {"clock_2", "time_sign_embed"}
    z, cond = torch.randn(1, 16, 8, 8), condition(1)
    expected = sample(student, z, cond, steps=2, generator=torch.Generator().manual_seed(0))
    again = add_lora(load(folder), 2, conditioning="dual+sign")
    load_lora(again, saved)
    assert torch.equal(sample(again, z, cond, steps=2, generator=torch.Generator().manual_seed(0)), expected)
    pipe = attach(DiffusionPipeline.from_pretrained(folder), saved)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a fox", num_inference_steps=2, guidance_scale=0.0, height=16, width=16, output_type="latent",
                 generator=torch.Generator().manual_seed(1)).images  # fmt: skip
    with pytest.raises(ValueError, match=r"call twinflow\.attach"):  # a stock pipeline would draw without it
        DiffusionPipeline.from_pretrained(folder).load_lora_weights(saved)
    assert drawn.isfinite().all() and drawn.shape == (1, 16, 8, 8)
    whole = load(folder, conditioning="dual")
    scramble(whole)
    loaded = load(export(whole, tmp_path / "whole"))
    torch.testing.assert_close(sample(loaded, z, cond), sample(whole, z, cond))


def test_it_is_planned():
    workload = workload_of("toy-2", resolution=512, batch=2)
    forecast = Planner(workload).forecast(PRESETS["checkpoint"])
    assert workload.latent == (16, 64, 64) and 1e6 < forecast.peak < 1e9


def test_a_run_from_images_to_a_picture(tmp_path, folder):
    changes = {"pretrained_model_name_or_path": str(folder), "model_family": "toy-image", "max_train_steps": 2,
               "validation_prompt": "a digit", "validation_steps": 2}  # fmt: skip
    chosen = settings(tmp_path, **changes)
    assert chosen.model_family == "toy"
    train(chosen, quiet())
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "export")]) == 0
    generator = ImageGenerator(folder, tmp_path / "export")
    assert generator.generate("a digit", seed=0, steps=1, size=(32, 32)).size == (32, 32)
    assert len(list((tmp_path / "run").rglob("*.png"))) > 1
