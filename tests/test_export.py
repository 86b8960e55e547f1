"""Exports: the same files whatever wraps the student, and what stock diffusers makes of them."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from helpers.export_cases import (
    FAMILIES,
    contents,
    lora_student,
    scrambled,
    stock_pipeline,
    velocity,
    whole_student,
)
from helpers.tiny_pipelines import tiny_transformer
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from twinflow import EMATeacher
from twinflow.export import export, merged
from twinflow.formats.export_folder import without_refusal
from twinflow.formats.manifest import CONDITIONING, LORA, read_manifest, read_tensors
from twinflow.lora import add_lora
from twinflow.models import load
from twinflow.models.sd3 import SD3Model

CONFIG = dict(r=4, lora_alpha=6, target_modules=list(SD3Model.lora_targets))


def by_get_peft_model():
    student = load(get_peft_model(tiny_transformer("sd3"), LoraConfig(**CONFIG)), conditioning="dual+sign")
    return scrambled(student)


def by_add_adapter():
    transformer = tiny_transformer("sd3")
    transformer.requires_grad_(False).add_adapter(LoraConfig(**CONFIG))
    return scrambled(load(transformer, conditioning="dual+sign"))


def compiled():
    return torch.compile(lora_student(), backend="eager")


def compiled_transformer():
    student = lora_student()
    student.transformer = torch.compile(student.transformer, backend="eager")
    return student


def compiled_blocks():
    student = lora_student()
    blocks = student.network.transformer_blocks
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="eager")
    return student


def data_parallel():
    return DistributedDataParallel(lora_student())


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "make",
    [by_get_peft_model, by_add_adapter, compiled, compiled_transformer, compiled_blocks, data_parallel],
    ids=lambda make: make.__name__,
)
@pytest.mark.usefixtures("process_group")
def test_the_same_files_whatever_wraps_the_student(make, tmp_path):
    export(lora_student(), tmp_path / "plain")
    export(make(), tmp_path / "wrapped")
    assert contents(tmp_path / "wrapped") == contents(tmp_path / "plain")
    names = load_file(tmp_path / "plain" / LORA)
    assert all(name.startswith("transformer.") and ".lora_" in name for name in names)
    assert not any(mark in name for mark in ("base_layer", "module.", "_orig_mod", "default") for name in names)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: torch.compile(s, backend="eager")], ids=["plain", "compiled"])
def test_averages_go_out_under_the_names_of_the_student_s_own(wrap, tmp_path):
    student = wrap(lora_student())
    teacher = EMATeacher(student, 0.9)
    teacher.update()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(2 if parameter.requires_grad else 1)
    teacher.update()
    export(student, tmp_path / "student")
    export(student, tmp_path / "ema", teacher=teacher)
    assert [read_manifest(tmp_path / name).weights for name in ("student", "ema")] == ["student", "ema"]
    averages = {name.replace(".default.", "."): value for name, value in teacher.parameters().items()}
    for file, prefix in ((LORA, ""), (CONDITIONING, "transformer.")):
        mine, theirs = read_tensors(tmp_path / "student" / file), read_tensors(tmp_path / "ema" / file)
        assert mine.keys() == theirs.keys() and not any("ema" in name for name in mine)
        for name, value in theirs.items():
            assert torch.equal(value, averages[prefix + name])
            assert not torch.equal(value, mine[name]) or name == "time_sign_embed.weight"


def test_a_lora_file_is_the_one_that_diffusers_writes(tmp_path):
    student = lora_student(mode="midpoint+sign")
    export(student, tmp_path / "ours")
    settings = student.network.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(student.network)
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=settings)
    mine, theirs = load_file(tmp_path / "ours" / LORA), load_file(tmp_path / LORA)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    stock = adapter_settings(tmp_path / LORA)
    for name, value in adapter_settings(tmp_path / "ours" / LORA).items():
        assert value == (sorted(stock[name]) if name.endswith("target_modules") else stock[name])


def adapter_settings(file):
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["lora_adapter_metadata"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_pipeline_computes_what_the_student_computes(family, tmp_path):
    student = lora_student(family, None)  # scaling 1.5
    pipe = stock_pipeline(family)
    pipe.load_lora_weights(export(student, tmp_path))
    assert torch.equal(velocity(load(pipe.transformer), family), velocity(student, family))


@pytest.mark.parametrize("mode", ["dual", "dual+sign"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_pipeline_refuses_weights_that_need_a_second_embedder(family, mode, tmp_path):
    export(lora_student(family, mode), tmp_path)
    pipe = stock_pipeline(family)
    before = velocity(load(pipe.transformer), family)
    for given in (tmp_path, tmp_path / LORA):
        with pytest.raises(ValueError, match=r"call twinflow\.attach\(pipe, folder\)"):
            pipe.load_lora_weights(given)
    assert torch.equal(velocity(load(pipe.transformer), family), before)
    assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_model_refuses_weights_that_need_a_second_embedder(family, tmp_path):
    student = whole_student(family)
    export(student, tmp_path)
    with pytest.raises(ValueError, match=r"call twinflow\.attach\(pipe, folder\)"):
        type(student.network).from_pretrained(tmp_path)
    with without_refusal(tmp_path) as plain:
        again = load(plain)
    assert torch.equal(velocity(again, family), velocity(student, family))


@pytest.mark.parametrize("mode", [None, "midpoint", "midpoint+sign"])
def test_a_whole_model_loads_in_stock_diffusers(mode, tmp_path):
    student = whole_student(mode=mode)
    export(student, tmp_path)
    network = type(student.network).from_pretrained(tmp_path)
    torch.testing.assert_close(velocity(load(network), "sd3"), velocity(student, "sd3"), rtol=1e-4, atol=1e-5)
    again = load(tmp_path)
    assert (again.conditioning and again.conditioning.mode) == mode
    assert torch.equal(velocity(again, "sd3"), velocity(student, "sd3"))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: torch.compile(s, backend="eager")], ids=["plain", "compiled"])
def test_averages_of_a_whole_model_leave_the_student_as_it_is(wrap, tmp_path):
    model = whole_student(mode="midpoint+sign")
    model.network.to(torch.bfloat16)
    student = wrap(model)
    teacher = EMATeacher(student, 0.9, dtype=torch.float32)
    teacher.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    teacher.update()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(student, tmp_path, teacher=teacher)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    averages = {name.removeprefix("transformer."): value for name, value in teacher.parameters().items()}
    assert saved.keys() == model.network.state_dict().keys()
    assert all(torch.equal(saved[name], averages[name].to(saved[name].dtype)) for name in averages)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("base_rank", [2, 5])
def test_a_merged_lora_is_the_sum_of_both(base_rank, tmp_path):
    style = scrambled(
        add_lora(load(tiny_transformer("sd3")), base_rank, targets=("attn.to_q", "ff.net.2"), conditioning=None)
    )
    export(style, tmp_path / "style")
    student = lora_student(mode="midpoint", base_lora=tmp_path / "style")
    export(student, tmp_path / "merged", merge_base=True)
    pipe = stock_pipeline("sd3")
    pipe.load_lora_weights(tmp_path / "merged")
    assert set(pipe.transformer.peft_config) == {"default_0"}
    both = velocity(student, "sd3")
    torch.testing.assert_close(velocity(load(pipe.transformer), "sd3"), both, rtol=1e-4, atol=1e-5)
    export(student, tmp_path / "alone")
    assert (
        contents(tmp_path / "alone")[LORA] == contents(export(lora_student(mode="midpoint"), tmp_path / "other"))[LORA]
    )


def test_merging_folds_scalings_and_fills_with_zeros():
    generator = torch.Generator().manual_seed(0)

    def lora(rank, *layers):
        return {
            f"{layer}.lora_{place}.weight": torch.randn(shape, generator=generator, dtype=torch.float32)
            for layer in layers
            for place, shape in (("A", (rank, 5, 1, 1)), ("B", (6, rank, 1, 1)))
        }

    first, second = lora(2, "a", "b"), lora(3, "b", "c")
    tensors, rank = merged([(first, {"a": 0.5, "b": 2.0}), (second, {"b": 4.0, "c": 0.25})])
    assert rank == 5

    def product(weights, layer):
        a, b = (weights[f"{layer}.lora_{place}.weight"].flatten(1) for place in "AB")
        return b @ a

    wanted = {
        "a": 0.5 * product(first, "a"),
        "b": 2.0 * product(first, "b") + 4.0 * product(second, "b"),
        "c": 0.25 * product(second, "c"),
    }
    for layer, value in wanted.items():
        assert tensors[f"{layer}.lora_A.weight"].shape == (5, 5, 1, 1)
        torch.testing.assert_close(product(tensors, layer), value)
