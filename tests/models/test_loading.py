"""`load()`: which student comes of a module or a folder, which conditioning it has, and what is refused."""

import shutil

import pytest
import torch
from helpers.family_batches import FAMILIES, make_batch, make_student, randomised, relative
from helpers.teacher_cases import R, T, answer
from helpers.tiny_pipelines import saved_pipeline, tiny_transformer
from peft import LoraConfig, get_peft_model
from torch import nn

from twinflow.conditioning import MODES, TimeConditioning, TimeEmbedder
from twinflow.models import FAMILIES as KNOWN
from twinflow.models import load

WEIGHTS = "diffusion_pytorch_model.safetensors"


# What comes of it.


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_and_folders_give_the_familys_student(family):
    """The module itself, peft's wrapper of it, a pipeline's folder and the transformer's own: one function."""
    network, folder = tiny_transformer(family), saved_pipeline(family)
    students = [
        load(network),
        load(str(folder)),
        load(folder / "transformer"),
        load(tiny_transformer(family), family=family.partition("_g")[0]),
    ]
    students.append(load(get_peft_model(tiny_transformer(family), LoraConfig(r=2, target_modules=["to_q"]))))
    batch = make_batch(family, students[0], 4)
    expected = answer(students[0], batch)
    assert students[0].transformer is network and students[0].family in KNOWN
    for student in students:
        assert type(student) is KNOWN[students[0].family] and student.conditioning is None
        assert torch.equal(answer(student, batch), expected)


def test_the_dtype_of_a_loaded_model():
    assert load(saved_pipeline("sd3")).dtype == torch.float32
    student = load(saved_pipeline("sd3"), torch_dtype=torch.bfloat16, conditioning="dual+sign")
    assert student.dtype == torch.bfloat16
    assert {p.dtype for p in student.conditioning.parameters()} == {torch.float32}


def test_a_subclass_of_a_known_transformer():
    class Mine(type(tiny_transformer("sd3"))):
        pass

    network = tiny_transformer("sd3")
    network.__class__ = Mine
    assert load(network).family == "sd3"


@pytest.mark.parametrize("options", [
    dict(), dict(time_scale=1000.0), dict(reversed_time=True), dict(data_ward=True),
    dict(reversed_time=True, time_scale=10.0),
])  # fmt: skip
def test_any_callable(options):
    """family='generic': time scale and direction, sign of the output."""
    asked = []

    def network(x, time, cond):
        asked.append(time)
        return x * 2 + cond

    student, x, cond = load(network, family="generic", **options), torch.randn(4, 3, 4), torch.ones(4, 3, 4)
    expected = (x * 2 + cond) * (-1 if "data_ward" in options else 1)
    assert torch.equal(student(x, T, R, cond), expected)
    time = (1 - T if "reversed_time" in options else T) * options.get("time_scale", 1.0)
    assert torch.equal(asked[0], time)


class Net(nn.Module):
    """A module of one's own with diffusers' kind of time embedder."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 5), nn.SiLU(), nn.Linear(5, 4))

    def forward(self, x, time, cond):
        angle = time[:, None] * 100 * 10000 ** (-torch.arange(4) / 4)
        return x * self.embed(torch.cat([angle.cos(), angle.sin()], 1))


def test_a_generic_module_is_conditioned_where_it_says():
    place = TimeEmbedder("embed", "embed_2", scale=100.0, num_channels=8)
    net = Net()
    student = load(net, family="generic", embedder=place, conditioning="dual+sign")
    x = torch.randn(4, 4)
    plain = Net()
    plain.embed.load_state_dict(net.embed.state_dict())
    torch.testing.assert_close(student(x, T, R, None), plain(x, T, None), rtol=1e-4, atol=1e-5)
    randomised(student)
    assert relative(student(x, T, R, None), student(x, T, T, None)) > 1e-4
    assert {name.partition(".")[0] for name, _ in net.named_parameters()} == {"embed", "embed_2", "time_sign_embed"}
    with pytest.raises(ValueError, match="load: embedder must say where a generic module's time goes in, got None"):
        load(Net(), family="generic", conditioning="dual")


# What is refused.


@pytest.mark.parametrize("given, message", [
    (nn.Linear(2, 2), "load: family must be given for a Linear, got None; known classes are QwenImageTransf.*generic"),
    (lambda x: x, "load: family must be given for a function"),
    (3, "load: family must be given for a int"),
])  # fmt: skip
def test_an_unknown_class(given, message):
    with pytest.raises(ValueError, match=message):
        load(given)


@pytest.mark.parametrize("options, message", [
    (dict(family="sdxl"), "load: family must be one of qwen_image, sd3, .*, got 'sdxl'"),
    (dict(conditioning="both"), r"load: conditioning must be None or one of dual, midpoint, .*, got 'both'"),
    (dict(conditioning=True), "load: conditioning must be None or one of dual, midpoint, .*, got True"),
    (dict(cfg_time="half"), "load: cfg_time must be one of published, t, got 'half'"),
])  # fmt: skip
def test_unknown_options(options, message):
    network = tiny_transformer("sd3")
    names = list(network.state_dict())
    with pytest.raises(ValueError, match=message):
        load(network, **options)
    assert list(network.state_dict()) == names


def changed_folder(tmp_path, config=None, cut=None):
    shutil.copytree(saved_pipeline("sd3") / "transformer", tmp_path / "model")
    if config is not None:
        (tmp_path / "model" / "config.json").write_text(config)
    if cut is not None:
        weights = (tmp_path / "model" / WEIGHTS).read_bytes()
        (tmp_path / "model" / WEIGHTS).write_bytes(weights[:cut])
    return tmp_path / "model"


@pytest.mark.parametrize("config, message", [
    ('{"_class_name": "SD3', "config.json' is not a valid JSON file"),  # diffusers' own words
    ("", "config.json' is not a valid JSON file"),
    ("{}", "load: name_or_path must hold a model of diffusers .*, got None"),
    ("[]", "load: name_or_path must hold a model of diffusers .*, got None"),
    ('{"_class_name": 3}', "load: name_or_path must hold a model of diffusers .*, got 3"),
    ('{"_class_name": "NoSuchModel"}', "load: name_or_path must hold a model of diffusers .*, got NoSuchModel"),
    ('{"_class_name": "logging"}', "load: name_or_path must hold a model of diffusers .*, got logging"),
    ('{"_class_name": "FluxPipeline"}', "load: name_or_path must hold a model of diffusers .*, got FluxPipeline"),
])  # fmt: skip
def test_a_corrupted_config(config, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        load(changed_folder(tmp_path, config))


@pytest.mark.parametrize("cut", [-100, 30, 0])
def test_truncated_weights_are_named(cut, tmp_path):
    with pytest.raises((ValueError, OSError), match=WEIGHTS):
        load(changed_folder(tmp_path, cut=cut))


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"load: name_or_path must hold a model or a pipeline, got .* without config"):
        load(tmp_path)
    shutil.copytree(saved_pipeline("sd3") / "vae", tmp_path / "transformer")
    with pytest.raises(ValueError, match="load: family must be given for a AutoencoderKL"):
        load(tmp_path)
    (changed_folder(tmp_path) / WEIGHTS).unlink()
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        load(tmp_path / "model")


@pytest.mark.parametrize("family, changes, mode, message", [
    ("sana", dict(guidance_embeds=True), "dual", "load: transformer must be a flow-matching model, got SANA-Sprint"),
    ("qwen_image", dict(zero_cond_t=True), "dual", "load: conditioning must be None for an edit model"),
])  # fmt: skip
def test_relatives_that_are_no_such_student(family, changes, mode, message):
    """Refused before anything is added to them."""
    network = tiny_transformer(family, **changes)
    names = list(network.state_dict())
    with pytest.raises(ValueError, match=message):
        load(network, conditioning=mode)
    assert list(network.state_dict()) == names


@pytest.mark.parametrize("mode", MODES)
def test_conditioning_is_set_once(mode):
    student = make_student("sd3", mode)
    with pytest.raises(
        ValueError, match=rf"load: conditioning must be set once, got 'dual' after '{mode.replace('+', '.')}'"
    ):
        student.condition("dual")
    embedder = student.transformer.get_submodule(student.time_embedder().path)
    names, hooks = list(student.transformer.state_dict()), dict(embedder._forward_hooks)
    for again in (mode, "dual+sign", "midpoint"):
        with pytest.raises(ValueError, match="transformer must be without conditioning, got one with"):
            load(student.transformer, conditioning=again)
    assert list(student.transformer.state_dict()) == names and embedder._forward_hooks == hooks


@pytest.mark.parametrize("make, message", [
    (lambda: TimeConditioning(tiny_transformer("sd3"), TimeEmbedder("a", "b"), "both"),
     "TimeConditioning: mode must be one of dual, midpoint, sign, dual.sign, midpoint.sign, got 'both'"),
    (lambda: TimeConditioning(nn.Linear(2, 2), TimeEmbedder("time.mlp", "time_2.mlp"), "dual"),
     "TimeConditioning: transformer must have a time embedder at time.mlp, got a Linear without one"),
])  # fmt: skip
def test_conditioning_of_the_wrong_thing(make, message):
    with pytest.raises(ValueError, match=message):
        make()
