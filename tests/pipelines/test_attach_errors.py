"""`twinflow.attach`: what is refused, by name, with the pipeline left as it was."""

import json
import shutil

import pytest
import torch
from helpers.drawing import draw, sampled
from helpers.export_cases import lora_student, stock_pipeline, velocity, whole_student
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import twinflow
from twinflow.export import export
from twinflow.formats.manifest import ADAPTER_SETTINGS, CONDITIONING, LORA, MANIFEST
from twinflow.models import load
from twinflow.pipelines.time_hooks import SchedulerTimeHooks

WEIGHTS = "diffusion_pytorch_model.safetensors"


def exported(student=lora_student, *arguments, **options):
    """An exported folder."""
    return lambda folder: export(student(*arguments), folder, **options)


def changed(make, change):
    """An exported folder in which something has been changed."""

    def build(folder):
        return change(make(folder)) or folder

    return build


def truncated(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9]) and None


def removed(name):
    return lambda folder: (folder / name).unlink()


def written(name, text):
    return lambda folder: (folder / name).write_text(text) and None


def tensors(name, edit):
    """The tensors of a safetensors file changed, its metadata kept."""

    def change(folder):
        with safe_open(folder / name, framework="pt") as file:
            metadata = file.metadata()
        save_file(edit(load_file(folder / name)), folder / name, metadata)

    return change


def settings(edit):
    """The adapter's configuration in the LoRA file changed."""

    def change(folder):
        found = load_file(folder / LORA)
        with safe_open(folder / LORA, framework="pt") as file:
            metadata = file.metadata()
        save_file(found, folder / LORA, metadata | {ADAPTER_SETTINGS: edit(metadata[ADAPTER_SETTINGS])})

    return change


def setting(name, value):
    return settings(lambda text: json.dumps(json.loads(text) | {f"transformer.{name}": value}))


def renamed(ending, new):
    """One tensor goes under another name."""
    return lambda found: {new if k.endswith(ending) and ".0." in k else k: v for k, v in found.items()}


def narrowed(ending):
    """Tensors lose a column and a row."""
    return lambda found: {k: v[:, 1:].contiguous() if k.endswith(ending) else v for k, v in found.items()}


def alone(folder):
    """The LoRA file without its folder."""
    target = folder.parent / "alone.safetensors"
    shutil.copy(folder / LORA, target)
    return target


dual, midpoint = exported(lora_student, "sd3", "dual+sign"), exported(lora_student, "sd3", "midpoint")
full = exported(whole_student, "sd3", "dual+sign")
plain_full = changed(exported(whole_student, "sd3", None), removed(MANIFEST))

BAD = {
    "missing": (lambda folder: folder, r"must be a folder or a file, got .*out, which does not exist"),
    "empty": (lambda folder: folder.mkdir() or folder, rf"must hold {LORA} or a model's config\.json"),
    "ComfyUI's": (
        exported(lora_student, "z_image", format="comfyui"), r"of format 'diffusers', got 'comfyui'"
    ),
    "family": (exported(lora_student, "flux"), r"pipe must be of family flux, got sd3"),
    "family without manifest": (
        changed(exported(lora_student, "flux", None), removed(MANIFEST)), r"must name layers of SD3Transformer2DModel"
    ),
    "family of a model": (exported(whole_student, "sana", None), r"pipe must be of family sana, got sd3"),
    "family of a model without manifest": (
        changed(exported(whole_student, "sana", None), removed(MANIFEST)), r"pipe must be of family sana, got sd3"
    ),
    "truncated LoRA": (changed(midpoint, truncated(LORA)), rf"{LORA} must be a whole safetensors file"),
    "truncated conditioning": (changed(dual, truncated(CONDITIONING)), rf"{CONDITIONING} must be a whole"),
    "no conditioning": (changed(dual, removed(CONDITIONING)), r"conditioning must have 5 tensors .* got a difference"),
    "narrow conditioning": (
        changed(dual, tensors(CONDITIONING, narrowed("embed.weight"))), r"time_sign_embed\.weight must be of shape"
    ),
    "damaged manifest": (changed(dual, written(MANIFEST, "{")), rf"{MANIFEST} must be a file that export wrote"),
    "no LoRA": (changed(midpoint, removed(LORA)), rf"{LORA} must be a whole safetensors file, got .*No such file"),
    "empty LoRA": (changed(midpoint, tensors(LORA, lambda _: {})), r"must hold LoRA weights, got none"),
    "damaged configuration": (changed(midpoint, settings(lambda _: "{")), r"an adapter's configuration, got a damaged"),
    "configuration of a list": (changed(midpoint, settings(lambda _: "[1]")), r"configuration, got a damaged"),
    "unknown setting": (changed(midpoint, setting("rang", 4)), r"must hold a LoRA that peft takes"),
    "another rank": (changed(midpoint, setting("r", 7)), r"must hold a LoRA that peft takes, got .*size mismatch"),
    "another layer": (
        changed(midpoint, tensors(LORA, renamed("lora_A.weight", "transformer.none.lora_A.weight"))),
        r"must name layers of .*, got transformer\.none\.",
    ),
    "another component": (
        changed(midpoint, tensors(LORA, renamed("lora_A.weight", "text_encoder.to_q.lora_A.weight"))),
        r"must name layers of .*, got text_encoder\.to_q",
    ),
    "another width": (changed(midpoint, tensors(LORA, narrowed("lora_A.weight"))), r"lora_A\.weight must be of width"),
    "dual alone": (changed(dual, alone), r"must be the whole exported folder, got .*alone\.safetensors without"),
    "truncated model": (changed(full, truncated(WEIGHTS)), rf"{WEIGHTS} must be a whole safetensors file"),
    "model without a weight": (
        changed(full, tensors(WEIGHTS, lambda t: {n: t[n] for n in t if n != "proj_out.bias"})),
        r"must hold every weight of its model, got none named proj_out\.bias",
    ),
    "model without a second embedder": (
        changed(full, tensors(WEIGHTS, lambda t: {n: t[n] for n in t if "_2." not in n})), r"difference in \['time_text"
    ),
    "damaged model configuration": (changed(full, written("config.json", "{")), r"must hold a whole model"),
    "damaged configuration of a plain model": (
        changed(plain_full, written("config.json", "{")), r"must hold a whole model"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_and_the_pipeline_draws_as_before(case, tmp_path):
    make, message = BAD[case]
    given = make(tmp_path / "out")
    pipe = stock_pipeline("sd3")
    refused(pipe, given, message)


def refused(pipe, given, message, error=ValueError, **options):
    """Refuses it with that message, and everything of the pipeline is as it was."""
    transformer, scheduler = pipe.transformer, pipe.scheduler
    before = velocity(load(transformer), "sd3")
    names = [name.replace("base_layer.", "") for name in transformer.state_dict()]
    with pytest.raises(error, match=message):
        twinflow.attach(pipe, given, **options)
    assert (
        pipe.transformer is transformer and pipe.scheduler is scheduler and SchedulerTimeHooks.of(transformer) is None
    )
    assert [name.replace("base_layer.", "") for name in transformer.state_dict()] == names
    assert torch.equal(velocity(load(transformer), "sd3"), before)


def test_after_a_refused_file_the_right_one_attaches(tmp_path):
    student = lora_student("sd3", "dual+sign")
    pipe = stock_pipeline("sd3")
    bad = changed(dual, setting("r", 7))(tmp_path / "bad")
    for _ in range(2):
        refused(pipe, bad, r"must hold a LoRA that peft takes, got .*size mismatch")
    twinflow.attach(pipe, export(student, tmp_path / "right"))
    torch.testing.assert_close(draw(pipe, "sd3"), sampled(student, pipe, "sd3"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"style": "many"}, ValueError, "style must be one of few, any, mul, got 'many'"),
        ({"gap_end": 2.0}, ValueError, "gap_end must be in"),
        ({"gap": 0.5}, TypeError, "gap"),
    ],
)
def test_bad_options_are_named(options, error, message, tmp_path):
    refused(stock_pipeline("sd3"), midpoint(tmp_path), message, error, **options)


def test_a_lora_file_alone_serves_the_style_whose_times_it_needs_not(tmp_path):
    student = lora_student("sd3", "midpoint")
    file = str(alone(export(student, tmp_path / "out")))
    pipe = stock_pipeline("sd3")
    refused(pipe, file, r"must be the whole exported folder", style="any")
    twinflow.attach(pipe, file)
    torch.testing.assert_close(draw(pipe, "sd3"), sampled(student, pipe, "sd3"), rtol=1e-4, atol=1e-4)


def test_a_second_export_is_refused(tmp_path):
    pipe = twinflow.attach(stock_pipeline("sd3"), midpoint(tmp_path / "one"))
    first = draw(pipe, "sd3")
    for adapter_name in ("twinflow", "other"):
        with pytest.raises(ValueError, match=r"pipe must have no export attached, got one; call twinflow\.detach"):
            twinflow.attach(pipe, dual(tmp_path / "two"), adapter_name=adapter_name)
    assert torch.equal(draw(pipe, "sd3"), first)


def test_a_name_that_is_taken_is_refused(tmp_path):
    pipe = stock_pipeline("sd3")
    pipe.load_lora_weights(midpoint(tmp_path / "out"), adapter_name="twinflow")
    refused(pipe, tmp_path / "out", "adapter_name must be a name that is not taken, got 'twinflow'")
    refused(pipe, dual(tmp_path / "out"), "adapter_name must be a name that is not taken, got 'twinflow'")


def test_a_transformer_in_training_is_refused(tmp_path):
    pipe = stock_pipeline("sd3")
    student = load(pipe.transformer, conditioning="midpoint")
    before = velocity(student, "sd3")
    for make in (midpoint, dual):
        with pytest.raises(ValueError, match="stock transformer, got one that is conditioned already"):
            twinflow.attach(pipe, make(tmp_path))
    assert torch.equal(velocity(student, "sd3"), before)


def test_what_is_no_pipeline_with_a_known_transformer_is_named(tmp_path):
    pipe = stock_pipeline("sd3")
    for given in (pipe.transformer, stock_pipeline("sd15"), None):
        with pytest.raises(TypeError, match="pipe must be a diffusers pipeline with a transformer, got"):
            twinflow.attach(given, tmp_path)
    pipe.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="of one of qwen_image, sd3, sana, flux, z_image, got one with a Linear"):
        twinflow.attach(pipe, midpoint(tmp_path))
