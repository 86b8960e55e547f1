"""The conditioning is part of the adapter: it follows every switch, and `detach` gives the pipeline back."""

import copy
import threading

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from helpers.drawing import PROMPTS, arguments, draw, start
from helpers.export_cases import lora_student, stock_pipeline, whole_student

import twinflow
from twinflow.export import export
from twinflow.scheduler import TwinFlowScheduler

CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    return export(lora_student("sd3", "dual+sign"), tmp_path_factory.mktemp("exports") / "dual")


@pytest.fixture(scope="module")
def base():
    pipe = stock_pipeline("sd3")
    pipe.scheduler = TwinFlowScheduler()
    return draw(pipe, "sd3")


SWITCHES = {
    "disable_lora": lambda pipe: pipe.disable_lora(),
    "unload_lora_weights": lambda pipe: pipe.unload_lora_weights(),
    "delete_adapters": lambda pipe: pipe.delete_adapters("twinflow"),
    "set_adapters to 0": lambda pipe: pipe.set_adapters("twinflow", 0.0),
    "disable_adapters of the transformer": lambda pipe: pipe.transformer.disable_adapters(),
    "fuse and unfuse, then off": lambda pipe: (pipe.fuse_lora(), pipe.unfuse_lora(), pipe.disable_lora()),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_off_means_the_base(switch, dual, base):
    pipe = twinflow.attach(stock_pipeline("sd3"), dual)
    SWITCHES[switch](pipe)
    # Fusing and taking out again rounds; every other switch leaves the base bit for bit.
    torch.testing.assert_close(draw(pipe, "sd3"), base, **(CLOSE if "fuse" in switch else dict(rtol=0, atol=0)))


def test_off_in_one_call_and_on_again(dual, base):
    pipe = twinflow.attach(stock_pipeline("sd3"), dual)
    attached = draw(pipe, "sd3")
    assert torch.equal(draw(pipe, "sd3", joint_attention_kwargs={"scale": 0.0}), base)
    assert torch.equal(draw(pipe, "sd3"), attached) and not torch.equal(attached, base)


def test_half_the_lora_is_half_the_second_embedding(dual):
    pipe = twinflow.attach(stock_pipeline("sd3"), dual)
    added = []
    pipe.transformer.time_text_embed.timestep_embedder.register_forward_hook(lambda m, a, out: added.append(out))
    for scale in (1.0, 0.5, 0.0):
        pipe.set_adapters("twinflow", scale)
        draw(pipe, "sd3", 1)
    whole, half, none = added
    assert not torch.allclose(whole, none)
    torch.testing.assert_close(none, none.clone())
    assert (half - none).norm() < (whole - none).norm()


def test_fused_weights_keep_their_conditioning_and_are_not_saved_without_it(dual, tmp_path):
    pipe = twinflow.attach(stock_pipeline("sd3"), dual)
    attached = draw(pipe, "sd3")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="must be apart from the weights, got fused"):
        twinflow.detach(pipe)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe, "sd3"), attached, **CLOSE)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"call twinflow\.attach"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_detach_gives_the_pipeline_back(dual, tmp_path):
    pipe = stock_pipeline("sd3")
    scheduler, config, names = pipe.scheduler, dict(pipe.transformer.config), [*pipe.transformer.state_dict()]
    for _ in range(2):
        assert twinflow.detach(twinflow.attach(pipe, dual)) is pipe
        assert pipe.scheduler is scheduler and dict(pipe.transformer.config) == config
        assert [*pipe.transformer.state_dict()] == names
    with pytest.raises(ValueError, match="detach: pipe must have an export attached, got none"):
        twinflow.detach(pipe)
    twinflow.attach(pipe, export(whole_student("sd3"), tmp_path))
    with pytest.raises(ValueError, match="must have a LoRA attached, got a whole model"):
        twinflow.detach(pipe)


def test_another_export_after_unloading(dual, tmp_path):
    other = export(lora_student("sd3", "midpoint"), tmp_path)
    pipe = twinflow.attach(stock_pipeline("sd3"), dual)
    pipe.unload_lora_weights()
    torch.testing.assert_close(
        draw(twinflow.attach(pipe, other), "sd3"), draw(twinflow.attach(stock_pipeline("sd3"), other), "sd3")
    )


def sharing(pipe, **options):
    parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    other = StableDiffusion3Pipeline(**parts, scheduler=TwinFlowScheduler(**options))
    other.set_progress_bar_config(disable=True)
    return other


def test_pipelines_over_one_transformer_hear_their_own_times(dual):
    wanted = draw(twinflow.attach(stock_pipeline("sd3"), dual, style="any"), "sd3", 3)
    first = twinflow.attach(stock_pipeline("sd3"), dual)

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = True
        return tensors

    first("x", num_inference_steps=8, callback_on_step_end=stop, output_type="latent", **arguments("sd3"))
    copied = copy.deepcopy(first)
    copied.scheduler = TwinFlowScheduler(style="any")
    for other in (sharing(first, style="any"), copied):
        torch.testing.assert_close(draw(other, "sd3", 3), wanted, **CLOSE)


def test_a_call_within_a_call(dual):
    """A callback that draws with another scheduler between two steps changes nothing."""
    pipe = twinflow.attach(stock_pipeline("sd3"), dual, style="any")
    alone, other = draw(pipe, "sd3", 3), sharing(pipe)

    def preview(_, index, timestep, tensors):
        draw(other, "sd3", 2)
        return tensors

    torch.testing.assert_close(draw(pipe, "sd3", 3, callback_on_step_end=preview), alone, **CLOSE)


def test_threads_hear_their_own_times(dual):
    first = twinflow.attach(stock_pipeline("sd3"), dual, style="any")
    prompt, _, pooled, _ = first.encode_prompt(
        list(PROMPTS), None, None, do_classifier_free_guidance=False, max_sequence_length=32
    )
    given = dict(prompt_embeds=prompt, pooled_prompt_embeds=pooled, latents=start("sd3"), output_type="latent")
    given |= arguments("sd3")
    alone = {steps: first(num_inference_steps=steps, **given).images for steps in (2, 5)}
    images = {}

    def run(pipe, steps):
        images[steps] = pipe(num_inference_steps=steps, **given).images

    threads = [threading.Thread(target=run, args=(sharing(first, style="any"), steps)) for steps in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for steps, image in alone.items():
        torch.testing.assert_close(images[steps], image, **CLOSE)


def test_a_plain_lora_compiles_no_more_graphs(tmp_path):
    counts = []
    for plain in (True, False):
        torch._dynamo.reset()
        pipe, folder = stock_pipeline("sd3"), export(lora_student("sd3", None), tmp_path)
        graphs = []

        def count(graph, _, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        if plain:
            pipe.load_lora_weights(folder)
            pipe.scheduler = TwinFlowScheduler()
        else:
            twinflow.attach(pipe, folder)
        pipe.transformer = torch.compile(pipe.transformer, backend=count)
        for steps in (1, 2):
            draw(pipe, "sd3", steps)
        counts.append(len(graphs))
    assert counts[0] == counts[1]


def test_a_schedule_that_was_used_later_but_stands_elsewhere_is_not_asked(dual):
    """The call's own timestep decides between the schedules of a thread."""
    pipe = twinflow.attach(stock_pipeline("sd3"), dual, style="any")
    alone, left = draw(pipe, "sd3", 3), TwinFlowScheduler(style="mul")

    def leave_one_midway(_, index, timestep, tensors):
        left.set_timesteps(5)
        left.step(torch.zeros(1, 4), left.timesteps[0], torch.zeros(1, 4))
        return tensors

    assert torch.equal(draw(pipe, "sd3", 3, callback_on_step_end=leave_one_midway), alone)


@pytest.mark.parametrize("reversed, told", [(False, (600.0, 0.6)), (True, (0.4,))])
def test_a_timestep_is_known_in_the_units_of_its_pipeline(reversed, told):
    scheduler = TwinFlowScheduler()
    assert scheduler.asks_for(1000.0, reversed) is None
    scheduler.set_timesteps(sigmas=[0.6, 0.3])
    assert all(scheduler.asks_for(value, reversed) < 1e-5 for value in told)
    assert scheduler.asks_for(0.6 if reversed else 0.4, reversed) > 0.1


def test_nothing_of_it_stays(tmp_path):
    """Of FLUX.1-dev, which has one more check."""
    pipe, folder = stock_pipeline("flux_guidance"), export(lora_student("flux_guidance", "dual"), tmp_path)
    before = dict(pipe.transformer._forward_pre_hooks)
    for _ in range(2):
        twinflow.attach(pipe, folder)
        assert len(pipe.transformer._forward_pre_hooks) == len(before) + 2
        twinflow.detach(pipe)
    assert pipe.transformer._forward_pre_hooks == before and not pipe.transformer._forward_hooks
