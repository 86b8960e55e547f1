"""`add_lora` and `load_lora`: float32 adapters on a frozen base, and files that are refused where they do not fit."""

import copy
import json
import re

import pytest
import torch
from helpers.batches import move
from helpers.family_batches import FAMILIES, make_batch, make_student, relative
from helpers.teacher_cases import T, answer
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from twinflow.conditioning import LORA_MODE, MODES
from twinflow.export import export
from twinflow.formats.manifest import LORA
from twinflow.lora import add_lora, load_lora, lora_tensors
from twinflow.teachers.adapter_slot import adapter_layers


def written(student, path, *, prefix="transformer.", alpha=None, rename=None, cut=None):
    """The student's adapter as a file in diffusers' layout."""
    named = lora_tensors(student.network, "default").items()
    tensors = {f"{prefix}{name}": value.detach().clone() for name, value in named}
    for name in [name for name in tensors if rename and rename[0] in name]:
        tensors[name.replace(*rename)] = tensors.pop(name)
    for name in [name for name in tensors if cut is not None and cut in name]:
        tensors[name] = tensors[name][:, :-1].contiguous()
    metadata = {"format": "pt"}
    if alpha is not None:
        layers = sorted({name.removeprefix(prefix).split(".lora_")[0] for name in tensors})
        settings = {"lora_alpha": alpha, "r": 3, "target_modules": layers}
        metadata["lora_adapter_metadata"] = json.dumps({f"{prefix}{name}": value for name, value in settings.items()})
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.fixture
def styled():
    """A student whose own LoRA of rank 3 and alpha 12 counts."""
    student = add_lora(make_student("sd3"), 3, alpha=12, conditioning=None)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return student


# add_lora.


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_lora_changes_nothing_and_trains_nothing_of_the_base(family, mode):
    """Float32 on bf16; every target of the family is matched, and never the conditioning's own layers."""
    plain, student = (make_student(family, dtype=torch.bfloat16) for _ in range(2))
    base = {name: (id(p), p.clone()) for name, p in student.network.named_parameters()}
    assert add_lora(student, 2, conditioning=mode) is student
    batch = make_batch(family, student, 4, torch.bfloat16)
    if mode is None:
        assert torch.equal(answer(student, batch, T, T), answer(plain, batch, T, T))
    else:
        assert student.conditioning.mode == mode
    trained = {name: p for name, p in student.network.named_parameters() if p.requires_grad}
    added = () if mode is None else student.conditioning.names
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert all("lora_" in name or name.startswith(added) for name in trained if added or "lora_" not in name)
    now = {name.replace(".base_layer", ""): p for name, p in student.network.named_parameters()}
    for name, (identity, value) in base.items():
        assert id(now[name]) == identity and torch.equal(now[name], value) and not now[name].requires_grad
    layers = adapter_layers(student.network)
    assert all(any(name.endswith(target) for name in layers) for target in student.lora_targets)
    assert not any(name.startswith(student.conditioning_roots()) for name in layers)
    assert {tuple(layer.active_adapters) for layer in layers.values()} == {("default",)}


def test_targets_that_the_second_embedder_has_too():
    """Its layers have the names of the first's; it is trained in full and gets no adapter, whichever comes first."""
    for student in (make_student("sd3", "dual"), make_student("sd3")):
        add_lora(student, 2, targets=("linear_1", "linear_2"), conditioning="dual")
        layers = set(adapter_layers(student.network))
        assert layers == {
            f"time_text_embed.{name}.linear_{k}" for name in ("timestep_embedder", "text_embedder") for k in (1, 2)
        }
        assert all(p.requires_grad and p.dtype == torch.float32 for p in student.conditioning.parameters())


def test_the_default_conditioning_and_one_that_is_there():
    assert add_lora(make_student("sd3"), 2).conditioning.mode == LORA_MODE
    student = make_student("sd3", "sign")
    assert add_lora(student, 2, conditioning="dual").conditioning.mode == "sign"


@pytest.mark.parametrize("options, message", [
    (dict(rank=0), "add_lora: rank must be an integer >= 1, got 0"),
    (dict(rank=True), "add_lora: rank must be an integer >= 1, got True"),
    (dict(rank=2.0), r"add_lora: rank must be an integer >= 1, got 2\.0"),
    (dict(alpha=0), "add_lora: alpha must be a number > 0, got 0"),
    (dict(alpha="8"), "add_lora: alpha must be a number > 0, got '8'"),
    (dict(adapter=""), "add_lora: adapter must be a name without dots, got ''"),
    (dict(adapter="a.b"), "add_lora: adapter must be a name without dots, got 'a.b'"),
    (dict(adapter="mine"), "add_lora: adapter must be a name that is not taken, got 'mine'"),
    (dict(targets=("nothing",)), "add_lora: targets must be names of layers of SD3Transformer2DModel, got 'nothing', "),
    (dict(targets=("attn.to_q", "attn.to_kk")), "got 'attn.to_kk', which names none; did you mean 'attn.to_k'?"),
    (dict(targets=()), "add_lora: targets must name layers of SD3Transformer2DModel"),
    (dict(conditioning="both"), "conditioning must be None or one of dual, midpoint, .*, got 'both'"),
    (dict(base_lora="missing.safetensors"), "missing.safetensors must be a whole safetensors file, got"),
    (dict(base_lora="style", conditioning="both"), "conditioning must be None or one of dual, midpoint"),
    (dict(base_lora="style", adapter="base"), "add_lora: adapter 'base' must be free for base_lora, got it taken"),
    (dict(base_lora="truncated"), "must be a whole safetensors file, got"),
    (dict(base_lora="no prefix"), "base_lora must name layers of SD3Transf.*, as transformer.<layer>.lora_A.weight"),
    (dict(base_lora="a UNet's"), r"base_lora must name layers of .*, got unet\."),
    (dict(base_lora="another model's"), r"base_lora must name layers of .*, got transformer\..*to_elsewhere"),
    (dict(base_lora="another width"), r"attn.to_q.lora_A.weight must be of width 32 as its layer, got \(3, 31\)"),
    (dict(base_lora="empty"), "add_lora: base_lora must hold LoRA weights, got none"),
])  # fmt: skip
def test_refused_and_nothing_changed(options, message, styled, tmp_path):
    """A style LoRA that stock loading would pass over in silence is refused too."""
    files = {
        "style": {}, "no prefix": dict(prefix=""), "a UNet's": dict(prefix="unet."),
        "another model's": dict(rename=("attn.to_q", "attn.to_elsewhere")),
        "another width": dict(cut="attn.to_q.lora_A"),
    }  # fmt: skip
    for name, how in files.items():
        written(styled, tmp_path / name, **how)
    (tmp_path / "truncated").write_bytes((tmp_path / "style").read_bytes()[:-60])
    save_file({}, tmp_path / "empty")
    student = make_student("sd3")
    if options.get("adapter") == "mine":
        student.network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "mine")
    if "base_lora" in options:
        options = options | {"base_lora": tmp_path / options["base_lora"]}
    before = {name: (id(p), p.requires_grad) for name, p in student.named_parameters()}
    with pytest.raises(ValueError, match=message):
        add_lora(student, **options)
    assert {name: (id(p), p.requires_grad) for name, p in student.named_parameters()} == before
    assert student.conditioning is None


@pytest.mark.parametrize("folder", [False, True])
def test_a_style_lora_keeps_its_own_scale(folder, styled, tmp_path):
    """Rank 3 and alpha 12: a scale of 4, which only the file's settings tell."""
    written(styled, tmp_path / LORA, alpha=12)
    student = add_lora(make_student("sd3"), 2, base_lora=tmp_path if folder else tmp_path / LORA)
    batch = make_batch("sd3", student, 4)
    assert relative(answer(student, batch, T, T), answer(styled, batch, T, T)) < 1e-5
    assert relative(answer(make_student("sd3"), batch, T, T), answer(styled, batch, T, T)) > 1e-2
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert not any(".base." in name for name in trained) and any(".default." in name for name in trained)


# load_lora.


def test_a_lora_goes_on_from_its_file(styled, tmp_path):
    for file in (tmp_path / LORA, tmp_path / "other.safetensors"):
        written(styled, file, alpha=12)
        student = add_lora(make_student("sd3"), 3, alpha=12, conditioning="dual")
        batch = make_batch("sd3", student, 4)
        load_lora(student, tmp_path if file.name == LORA else file)
        assert relative(answer(student, batch, T, T), answer(styled, batch, T, T)) < 1e-5
        for name, value in load_file(file).items():
            mine = lora_tensors(student.network, "default")[name.removeprefix("transformer.")]
            assert torch.equal(mine, value) and mine.requires_grad


@pytest.mark.parametrize("mode", [None, "dual", "sign", "midpoint", "dual+sign"])
def test_an_export_goes_on_with_its_conditioning(mode, tmp_path):
    student, other = (move(add_lora(make_student("sd3"), 4, conditioning=mode)) for _ in range(2))
    batch = make_batch("sd3", student, 4)
    expected = answer(student, batch)
    assert not torch.equal(answer(other, batch), expected)
    load_lora(other, export(student, tmp_path))
    assert torch.equal(answer(other, batch), expected)


def test_an_export_of_another_mode_changes_nothing(tmp_path):
    folder = export(move(add_lora(make_student("sd3"), 4, conditioning="dual")), tmp_path)
    for mode in ("midpoint", "dual+sign", None):
        student = move(add_lora(make_student("sd3"), 4, conditioning=mode))
        before = copy.deepcopy(student.state_dict())
        message = f"load_lora: student must have conditioning 'dual'.*, got {re.escape(repr(mode))}"
        with pytest.raises(ValueError, match=message):
            load_lora(student, folder)
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    student = make_student("sd3")
    with pytest.raises(ValueError, match=r"add_lora: base_lora must be a LoRA on its own, got .* second embedder"):
        add_lora(student, 4, base_lora=folder)
    assert student.conditioning is None and not hasattr(student.network, "peft_config")


@pytest.mark.parametrize("student, how, message", [
    (dict(rank=2), {}, r"load_lora: .* must be of rank 2, got rank 3 in "),
    (dict(rank=3, targets=("attn.to_q",)), {}, "must have the adapter's layers, got a difference in "),
    (dict(rank=3), dict(rename=("attn.to_q", "attn.to_p")), "must have the adapter's layers, got a difference in "),
    (dict(rank=3), dict(prefix="unet."), "must have the adapter's layers, got a difference in "),
    (dict(rank=3), dict(cut="to_q.lora_A"), "load_lora: "),
    (dict(rank=3, alpha=3), dict(alpha=12), "load_lora: .* must be of alpha 3, got alpha 12"),
    (dict(rank=3, adapter="other"), {}, "load_lora: adapter must be one that the student has, got 'default'"),
    (None, {}, "load_lora: adapter must be one that the student has, got 'default'"),
])  # fmt: skip
def test_a_file_that_does_not_fit_changes_nothing(student, how, message, styled, tmp_path):
    file = written(styled, tmp_path / LORA, **how)
    student = make_student("sd3") if student is None else add_lora(make_student("sd3"), **student)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=message):
        load_lora(student, file)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:20], lambda data: b"", lambda data: b"x" * 99]
)
def test_a_damaged_file_changes_nothing(damage, styled, tmp_path):
    file = written(styled, tmp_path / LORA)
    file.write_bytes(damage(file.read_bytes()))
    student = add_lora(make_student("sd3"), 3)
    before = copy.deepcopy(student.state_dict())
    for call in (lambda: load_lora(student, tmp_path), lambda: add_lora(make_student("sd3"), 2, base_lora=tmp_path)):
        with pytest.raises(ValueError, match=rf"{LORA} must be a whole safetensors file, got "):
            call()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
