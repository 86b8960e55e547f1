"""A family defined in this file alone: one subclass and one line, then everything that other families do."""

from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models import ModelMixin
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from helpers.batches import move
from helpers.tiny_pipelines import saved_pipeline
from helpers.tiny_text import spread_weights
from helpers.training_cases import quiet, settings
from torch import nn

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss, attach
from twinflow.cli import main
from twinflow.conditioning import MODES, TimeEmbedder
from twinflow.export import export
from twinflow.formats.manifest import COMFYUI_MODEL, CONDITIONING, read_manifest, read_names
from twinflow.lora import add_lora, load_lora
from twinflow.memory import PRESETS
from twinflow.memory.planner.forecast import Planner
from twinflow.memory.planner.workload import workload_of
from twinflow.models import FlowModel, load, register
from twinflow.models.autoencoders import Autoencoder
from twinflow.models.base import Published
from twinflow.models.modulation import Modulation
from twinflow.models.registry import REGISTRATIONS
from twinflow.pipelines.generator import ImageGenerator
from twinflow.sampling import sample
from twinflow.train.run import train


class ToyBlock(nn.Module):
    """Modulated attention over image and prompt; a wide one has twice the inner width."""

    def __init__(self, width: int, wide: bool) -> None:
        super().__init__()
        inner = width * (1 + wide)
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out, self.modulate = nn.Linear(inner, width), nn.Linear(width, 2 * width)

    def forward(self, tokens, embedding):
        scale, gate = self.modulate(F.silu(embedding))[:, None].chunk(2, -1)
        x = F.layer_norm(tokens, tokens.shape[-1:]) * (1 + scale)
        attended = F.scaled_dot_product_attention(*(f(x)[:, None] for f in (self.query, self.key, self.value)))[:, 0]
        return tokens + gate * self.out(attended)


class ToyTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A transformer that no family knows; diffusers has it while a test runs."""

    _repeated_blocks = ["ToyBlock"]  # noqa: RUF012 - as diffusers declares it
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, sample_size=8, patch_size=2, in_channels=16, width=32, depth=2, wide_layers=(),
                 joint_attention_dim=48, pooled_projection_dim=40):  # fmt: skip
        super().__init__()
        self.patch = nn.Linear(4 * in_channels, width)
        self.words, self.pooled = nn.Linear(joint_attention_dim, width), nn.Linear(pooled_projection_dim, width)
        self.clock = nn.Module()
        self.clock.embedder = TimestepEmbedding(256, width)
        self.blocks = nn.ModuleList(ToyBlock(width, i in wide_layers) for i in range(depth))
        self.unpatch = nn.Linear(width, 4 * in_channels)
        self.gradient_checkpointing = False

    def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict=True, **_):
        image = self.patch(F.pixel_unshuffle(hidden_states, 2).flatten(2).mT)
        features = get_timestep_embedding(timestep, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        embedding = self.clock.embedder(features.to(image.dtype)) + self.pooled(pooled_projections)
        tokens = torch.cat([image, self.words(encoder_hidden_states)], 1)
        for block in self.blocks:
            tokens = block(tokens, embedding)
        grid = [edge // 2 for edge in hidden_states.shape[2:]]
        out = self.unpatch(tokens[:, : image.shape[1]]).mT.unflatten(2, grid)
        return (F.pixel_shuffle(out, 2),)


class ToyPipeline(StableDiffusion3Pipeline):
    """A pipeline with a guidance argument of its own, for a transformer that was distilled at a scale of 2.5."""

    def __call__(self, prompt=None, *, text_scale=1.0, guidance_scale=2.5, **options):
        assert guidance_scale == 2.5
        return super().__call__(prompt, guidance_scale=text_scale, **options)


class ToyAutoencoderKL(AutoencoderKL):
    """An autoencoder whose latents are scaled by half as much again."""


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
    second_embedder = "clock_2.embedder"
    condition_settings = {"prompt_embeds": "joint_attention_dim", "pooled_prompt_embeds": "pooled_projection_dim"}  # noqa: RUF012
    lora_targets = ("query", "value", "clock.embedder.linear_1")
    modulation = Modulation("clock.embedder", ("blocks",), ("modulate",))
    block_lists = (("depth", "blocks"),)
    special_blocks = "wide_layers"
    published = (
        Published("toy-2", dict(depth=8, wide_layers=(0, 1)), latent_channels=16, text_tokens=16, lora_rank=4,
                  text_encoder_gb=0.1),
    )  # fmt: skip
    pipeline_class = "ToyPipeline"
    guidance_argument, guidance_off, guidance = "text_scale", 1.0, 2.5
    autoencoder, latent_factor = HalfScaled, 4
    comfyui = True

    def time_embedder(self):
        return TimeEmbedder("clock.embedder", self.second_embedder)

    def velocity(self, x_t, t, cond, lengths):
        prompt, pooled = (cond[name].to(x_t.dtype) for name in self.condition_settings)
        return self.transformer(x_t, t * 1000, prompt, pooled, return_dict=False)[0]

    def encode_prompt(self, pipe, prompts, **options):
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **options)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    @staticmethod
    def comfyui_tensors(tensors):
        return {f"toy.{name}": value for name, value in tensors.items()}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """Registers the family, and takes it out again."""
    for cls in (ToyTransformer2DModel, ToyAutoencoderKL, ToyPipeline):
        monkeypatch.setattr(cls, "__module__", "diffusers.models")
        monkeypatch.setattr(diffusers, cls.__name__, cls, raising=False)
    register(ToyModel, aliases=("toy-image",))
    yield
    del REGISTRATIONS["toy"]


def transformer() -> ToyTransformer2DModel:
    """The same weights in every call."""
    torch.manual_seed(0)
    return spread_weights(ToyTransformer2DModel(wide_layers=(0,)))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pipeline of the family on disk."""
    stock = DiffusionPipeline.from_pretrained(saved_pipeline("sd3"))
    vae = ToyAutoencoderKL.from_config(stock.vae.config)
    vae.load_state_dict(stock.vae.state_dict())
    pipe = ToyPipeline(**stock.components | {"transformer": transformer(), "vae": vae})
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def condition(rows: int) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": torch.randn(rows, 5, 48), "pooled_prompt_embeds": torch.randn(rows, 40)}


@pytest.mark.parametrize("mode", MODES)
def test_a_step_with_every_conditioning(mode):
    student = add_lora(load(transformer()), 2, conditioning=mode)
    move(student, 0.05)
    assert student.family == "toy" and ("clock_2" in student.conditioning.names) == ("dual" in mode)
    x, cond = torch.randn(4, 16, 8, 8), condition(4)
    criterion = TwinFlowLoss(TwinFlowConfig(enhanced_ratio=0.5))
    criterion.backward(student, x, cond, condition(1), teacher=EMATeacher(student, 0.9))
    trained = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in trained.values())
    assert any("clock_2" in name for name in trained) == ("dual" in mode)


def test_an_export_keeps_a_second_embedder_of_any_name(tmp_path, folder):
    student = add_lora(load(folder), 2, conditioning="dual+sign")
    move(student, 0.05)
    saved = export(student, tmp_path / "export")
    assert read_manifest(saved).family == "toy"
    names = {name.partition(".")[0] for name in read_names(saved / CONDITIONING)}
    assert names == {"clock_2", "time_sign_embed"}
    z, cond = torch.randn(1, 16, 8, 8), condition(1)
    expected = sample(student, z, cond, steps=2, generator=torch.Generator().manual_seed(0))
    again = add_lora(load(folder), 2, conditioning="dual+sign")
    load_lora(again, saved)
    assert torch.equal(sample(again, z, cond, steps=2, generator=torch.Generator().manual_seed(0)), expected)
    with pytest.raises(ValueError, match=r"call twinflow\.attach"):  # a stock pipeline would draw without it
        DiffusionPipeline.from_pretrained(folder).load_lora_weights(saved)


def test_an_attached_export_draws_what_sample_draws(tmp_path, folder):
    student = add_lora(load(folder), 2)
    move(student, 0.05)
    pipe = attach(DiffusionPipeline.from_pretrained(folder), export(student, tmp_path / "export"))
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():  # with a graph the text encoders' attention rounds otherwise
        z, cond = torch.randn(1, 16, 8, 8), student.encode_prompt(pipe, ["a fox"])
    drawn = pipe("a fox", latents=z, num_inference_steps=1, height=16, width=16, output_type="latent").images
    assert torch.equal(drawn, sample(student, z, cond, steps=1))


def test_a_whole_model_is_exported_for_both_layouts(tmp_path, folder):
    whole = load(folder, conditioning="dual")
    move(whole, 0.05)
    loaded = load(export(whole, tmp_path / "whole"))
    z, cond = torch.randn(1, 16, 8, 8), condition(1)
    torch.testing.assert_close(sample(loaded, z, cond), sample(whole, z, cond))
    names = read_names(export(whole, tmp_path / "comfyui", format="comfyui") / COMFYUI_MODEL)
    assert names == {f"toy.{name}" for name in whole.network.state_dict()}


def test_it_is_planned():
    workload = workload_of("toy-2", resolution=512, batch=2)
    assert workload.latent == (16, 128, 128)
    blocks = workload.architecture.blocks()
    assert [block.special for block in blocks] == [True, True] + 6 * [False]
    assert workload.architecture.with_blocks(blocks[1:4]).config == {"depth": 3, "wide_layers": (0,)}
    assert 1e6 < Planner(workload).forecast(PRESETS["checkpoint"]).peak < 1e9


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
