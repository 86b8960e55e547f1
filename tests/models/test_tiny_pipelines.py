"""The tiny pipelines the other tests stand on: real classes, loaded from disk, in which every condition counts."""

import functools
import inspect
import math
import socket
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.tiny_pipelines import (
    FAMILIES,
    call_arguments,
    image_size,
    latent_shape,
    saved_pipeline,
    tiny_pipeline,
    tiny_transformer,
)

CONDITIONS = [
    (family, names)
    for family in FAMILIES
    for names in (("timestep", "t"), ("encoder_hidden_states", "cap_feats"), ("pooled_projections",), ("guidance",))
    if any(name in inspect.signature(type(tiny_transformer(family)).forward).parameters for name in names)
    and (names != ("guidance",) or family == "flux_guidance")
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self, address):
        raise AssertionError(f"a test asked the network for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def load(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def draw(pipe: DiffusionPipeline, family: str, prompt: str = "a red fox", **more: object) -> torch.Tensor:
    """The pipeline's output after two steps from fixed noise; the image as (B, C, H, W)."""
    more = {"output_type": "pt"} | more
    noise = torch.Generator().manual_seed(0)
    return pipe(prompt=prompt, num_inference_steps=2, generator=noise, **call_arguments(family), **more).images


@functools.cache
def recorded_call(family: str) -> tuple[torch.nn.Module, dict]:
    """The denoiser and what the stock pipeline sends it in the first of two steps, by argument name."""
    pipe, calls = load(saved_pipeline(family)), []
    network = denoiser(pipe)
    signature = inspect.signature(network.forward)
    hook = network.register_forward_pre_hook(
        lambda _module, args, kwargs: calls.append(signature.bind(*args, **kwargs).arguments), with_kwargs=True
    )
    draw(pipe, family)
    hook.remove()
    return network, dict(calls[0])


@torch.no_grad()
def velocity(network: torch.nn.Module, arguments: dict) -> torch.Tensor:
    out = network(**arguments)[0]
    return torch.stack(out) if isinstance(out, list) else out


def changed(value: object) -> object:
    """Another value of the same kind and size."""
    if isinstance(value, list):
        return [changed(entry) for entry in value]
    return value * 0.8 + 0.05 if value.ndim < 2 else value.std() * torch.randn_like(value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_loads_and_draws_an_image(family):
    pipe = load(saved_pipeline(family))
    image = draw(pipe, family)
    assert image.shape == (1, 3, *image_size(family))
    assert image.isfinite().all() and image.std() > 0.05
    assert ((image == 0) | (image == 1)).float().mean() < 0.5  # most pixels are not clipped
    assert draw(pipe, family, output_type="latent").numel() == math.prod(latent_shape(family, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_builds_and_their_reloads_have_equal_weights(family, tmp_path):
    stream = torch.get_rng_state()
    tiny_pipeline(family, tmp_path)
    assert torch.equal(torch.get_rng_state(), stream)
    again = load(tmp_path)
    first, networks = load(saved_pipeline(family)), 0
    for name, module in first.components.items():
        if isinstance(module, torch.nn.Module):
            networks += 1
            torch.testing.assert_close(again.components[name].state_dict(), module.state_dict(), rtol=0, atol=0)
    assert networks >= 3
    built = tiny_transformer(family)
    torch.testing.assert_close(denoiser(first).state_dict(), built.state_dict(), rtol=0, atol=0)
    assert 2_000 < sum(parameter.numel() for parameter in built.parameters()) < 400_000


@pytest.mark.parametrize(("family", "names"), CONDITIONS, ids=[f"{family}-{names[0]}" for family, names in CONDITIONS])
def test_every_condition_changes_the_output(family, names):
    network, arguments = recorded_call(family)
    name = next(name for name in names if arguments.get(name) is not None)
    before = velocity(network, arguments)
    after = velocity(network, arguments | {name: changed(arguments[name])})
    assert (after - before).norm() > 0.05 * before.norm()
    assert 0.5 < before.square().mean().sqrt() < 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_reaches_the_latents(family):
    pipe = load(saved_pipeline(family))
    fox, dog = (draw(pipe, family, prompt, output_type="latent") for prompt in ("a red fox", "two dogs on a hill"))
    assert (fox - dog).norm() > 1e-3 * fox.norm()
