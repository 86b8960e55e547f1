"""A quantised base: the bits of a plain one with the dequantised weights, for student and teacher, and nothing else."""

import copy
import logging
import pickle
import sys
from collections import Counter

import bitsandbytes.functional
import pytest
import torch
import torchao.quantization
from export_cases import contents
from family_batches import make_batch, make_student, relative
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_memory_together import FAMILIES, LEVELS, OFFLOAD, assert_equal, live_storages, student_of, trained
from tiny_pipelines import tiny_transformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from twinflow import EMATeacher, FrozenTeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.export import export
from twinflow.lora import add_lora
from twinflow.memory.deferred import defer_modulation
from twinflow.memory.offload import offload_activations
from twinflow.memory.quantised_base import QuantisedBase, quantise_base, quantised_form
from twinflow.memory.quantised_linear import PackedWeight, dequantised, load_library, pack
from twinflow.memory.recompute import selective_recompute
from twinflow.models import load

FORMS = ("nf4", "int8")
ERROR = {"nf4": (0.07, 0.11), "int8": (0.003, 0.01)}  # of normal weights, relative
Q = "transformer.transformer_blocks.0.attn.to_q"
TIMES = torch.tensor([0.9, 0.3]), torch.tensor([0.2, 0.3])


def linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    return getattr(layer, "base_layer", layer)


def pair(make, form: str) -> tuple[nn.Module, nn.Module, QuantisedBase]:
    """A quantised student, and a plain one with the weights that its packed ones stand for."""
    quantised, plain = make(), make()
    base = quantise_base(quantised, form)
    for name in base.layers:
        weight, before = dequantised(linear(quantised, name).weight), linear(plain, name).weight
        assert ERROR[form][0] < relative(weight.float(), before.float()) < ERROR[form][1], name
        before.data.copy_(weight)
    return quantised, plain, base


def bf16_student(family: str):
    torch.manual_seed(0)
    return add_lora(make_student(family, dtype=torch.bfloat16), rank=2)


def partly_trained(family: str = "qwen_image"):
    """A student without adapters that trains some layers of its first block, biases of frozen layers among them."""
    torch.manual_seed(0)
    student = make_student(family, conditioning="dual")
    student.transformer.requires_grad_(False)
    student.conditioning.requires_grad_()
    block = next(iter(student.network.transformer_blocks))
    block.attn.to_k.requires_grad_()
    block.attn.to_q.bias.requires_grad_()
    return student


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_five_steps_have_the_bits_of_the_dequantised_weights(family, form):
    quantised, plain, base = pair(lambda: student_of(family, True), form)
    assert quantised_form(quantised) == form and quantised_form(plain) is None
    assert str(base) == f"{form} base: {len(base.layers)} linear layers, 0.00 GB -> 0.00 GB"
    x, cond, _ = make_batch(family, quantised, 2)
    with torch.no_grad():
        assert torch.equal(quantised(x, *TIMES, cond), plain(x, *TIMES, cond))
    assert_equal(trained(quantised, 5, 1), trained(plain, 5, 1))


@pytest.mark.parametrize("family, form", [("qwen_image", "nf4"), ("z_image", "int8")])
def test_in_bf16(family, form):
    quantised, plain, base = pair(lambda: bf16_student(family), form)
    assert {linear(quantised, name).weight.packing.dtype for name in base.layers} == {torch.bfloat16}
    assert_equal(trained(quantised, 2, 1), trained(plain, 2, 1))


class Dequantised(TorchDispatchMode):
    """Dtypes of the weights that are made."""

    def __init__(self):
        super().__init__()
        self.dtypes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.twinflow.dequantise.default:
            self.dtypes[result.dtype] += 1
        return result


@pytest.mark.parametrize("form", FORMS)
def test_under_autocast(form):
    quantised, plain, _ = pair(lambda: student_of("sd3", True), form)
    with torch.autocast("cpu", torch.bfloat16):
        with Dequantised() as made:
            mine = trained(quantised, 2, 1)
        assert_equal(mine, trained(plain, 2, 1))
    assert set(made.dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("form", FORMS)
def test_a_student_that_trains_other_layers(form):
    quantised, plain, base = pair(partly_trained, form)
    assert Q in base.layers and Q.replace("to_q", "to_k") not in base.layers
    assert_equal(trained(quantised, 2, 1), trained(plain, 2, 1))


@pytest.mark.parametrize("family, form, levels", [("qwen_image", "nf4", LEVELS), ("sana", "int8", ("products",))])
def test_recompute_and_offload(family, form, levels):
    plain = trained(pair(lambda: student_of(family, True), form)[1], 1, 1)
    for level in levels:
        student = student_of(family, True)
        quantise_base(student, form)
        offload = offload_activations(**OFFLOAD)
        handles = [selective_recompute(student, level), offload.attach(student)]
        assert_equal(trained(student, 1, 1), plain)
        assert offload.stats.tensors > 0
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_and_shapes(form):
    layer, plain = nn.Linear(48, 40).requires_grad_(False), nn.Linear(48, 40).requires_grad_(False)
    pack(layer.weight, form)
    plain.load_state_dict({"weight": dequantised(layer.weight), "bias": layer.bias})
    layer.weight.data = layer.weight.data.clone()  # as moving to another device does
    for shape in ((48,), (3, 48), (2, 3, 48), (2, 3, 5, 48), (0, 48)):
        x = torch.randn(shape, requires_grad=True)
        found = []
        for each in (layer, plain):
            (dx,) = torch.autograd.grad(each(x).pow(3).sum(), x, create_graph=True)
            found += [each(x), dx, *torch.autograd.grad(dx.square().sum(), x)]
        assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True)), shape


class Saved:
    """Shapes and dtypes of what autograd saves beside parameters and their views, and the parameters among it."""

    def __init__(self, student, batch, level="all"):
        self.others, self.packed, self.step = Counter(), set(), 0
        with selective_recompute(student, level), torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x):
            self.out = student(batch[0], *TIMES, batch[1])

    def pack(self, tensor):
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, PackedWeight):
            self.packed.add(base.data_ptr())
        if not isinstance(base, nn.Parameter):
            self.others[tuple(tensor.shape), tensor.dtype] += 1
        return tensor


@pytest.mark.parametrize("level", ["all", "products", "input"])
@pytest.mark.parametrize("form", FORMS)
def test_the_packed_weight_alone_is_kept_for_backward(form, level):
    quantised, plain, _ = pair(lambda: student_of("qwen_image", True), form)
    batch = make_batch("qwen_image", plain, 2)
    kept = Saved(quantised, batch, level)
    assert kept.others == Saved(plain, batch, level).others
    assert kept.packed if level == "all" else not kept.packed


@pytest.mark.parametrize("level", ["all", pytest.param("products", marks=pytest.mark.slow)])
def test_compiled_blocks(level):
    """Graphs without breaks; each makes the weight for itself, and no whole one goes from forward to backward."""
    torch._dynamo.reset()
    quantised, plain, base = pair(lambda: student_of("qwen_image", True), "nf4")
    batch = make_batch("qwen_image", plain, 2)
    shapes = {tuple(linear(plain, name).weight.shape) for name in base.layers}
    shapes |= {shape[::-1] for shape in shapes}
    if level == "products":
        selective_recompute(quantised, level)
    quantised.network.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = quantised(batch[0], *TIMES, batch[1])
    kept = [x for x in saved if x._base is None and not isinstance(x, nn.Parameter) and x.is_floating_point()]
    assert kept and not [x.shape for x in kept if tuple(x.shape) in shapes]
    expected = plain(batch[0], *TIMES, batch[1])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)
    for student, result in ((quantised, out), (plain, expected)):
        student.zero_grad()
        result.square().sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in quantised.named_parameters():
        if theirs[name].grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=2e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("form, rate", [("nf4", 4 + 8 / 64 + 32 / (64 * 256)), ("int8", 8 + 32 / 512)])
def test_bytes_are_those_of_the_form(form, rate):
    weight = nn.Parameter(torch.randn(768, 512), requires_grad=False)
    pack(weight, form)
    parts = {"nf4": [768 * 256, 768 * 8, 4 * 24, 4], "int8": [768 * 512, 4 * 768]}[form]
    assert weight.numel() == sum(-(-part // 16) * 16 for part in parts)
    assert 8 * weight.numel() / (768 * 512) == pytest.approx(rate, rel=1e-3)
    student = student_of("sd3", True)
    before = dict(student.named_parameters())
    sizes = {name: p.numel() * 4 for name, p in before.items()}
    base = quantise_base(student, form)
    names = [next(n for n in (f"{name}.weight", f"{name}.base_layer.weight") if n in before) for name in base.layers]
    assert base.bytes_before == sum(sizes[name] for name in names)
    assert base.bytes_after == sum(before[name].untyped_storage().nbytes() for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns", [(64, 128), (192, 64), (3072, 64)])
def test_values_are_the_libraries_own(rows, columns, dtype):
    layer = nn.Linear(columns, rows, dtype=dtype).requires_grad_(False)
    nf4, int8 = copy.deepcopy(layer.weight), copy.deepcopy(layer.weight)
    pack(nf4, "nf4")
    codes, state = bitsandbytes.functional.quantize_4bit(layer.weight, compress_statistics=True, quant_type="nf4")
    assert torch.equal(dequantised(nf4), bitsandbytes.functional.dequantize_4bit(codes, state))
    pack(int8, "int8")
    torchao.quantization.quantize_(layer, torchao.quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    assert torch.equal(dequantised(int8), layer.weight.dequantize())
    assert dequantised(nf4).dtype == dequantised(int8).dtype == dtype


@pytest.mark.parametrize("columns", [16, 31, 32, 96, 130])
@pytest.mark.parametrize("form", FORMS)
def test_rows_that_no_block_of_64_ends_with(form, columns):
    weight = nn.Parameter(torch.randn(64, columns), requires_grad=False)
    before = weight.data.clone()
    pack(weight, form)
    assert ERROR[form][0] < relative(dequantised(weight), before) < ERROR[form][1]


@pytest.mark.parametrize("make", [lambda: student_of("qwen_image", True), partly_trained], ids=["lora", "copy"])
@pytest.mark.parametrize("kind", [lambda student: EMATeacher(student, 0.9), FrozenTeacher], ids=["ema", "frozen"])
def test_a_teacher_made_before_or_after_has_the_same_base(make, kind):
    quantised, plain, base = pair(make, "nf4")
    early = make()
    before = kind(early)
    assert quantise_base(early, "nf4") == base
    x, cond, _ = make_batch("qwen_image", plain, 2)
    expected = kind(plain).velocity(x, *TIMES, cond, "rollout")
    assert torch.equal(before.velocity(x, *TIMES, cond, "rollout"), expected)
    after = kind(quantised)
    assert torch.equal(after.velocity(x, *TIMES, cond, "rollout"), expected)
    for teacher, student in ((before, early), (after, quantised)):
        module = getattr(teacher, "module", student)
        assert all(linear(module, name).weight is linear(student, name).weight for name in base.layers)


def test_copies_pickles_and_casts():
    student = student_of("sd3", True)
    base = quantise_base(student, "nf4")
    x, cond, _ = make_batch("sd3", student, 2)
    expected = student(x, *TIMES, cond)
    twin = copy.deepcopy(student)
    assert all(linear(twin, n).weight.data_ptr() != linear(student, n).weight.data_ptr() for n in base.layers)
    assert torch.equal(twin(x, *TIMES, cond), expected)
    layer = linear(student, base.layers[0])
    loaded = pickle.loads(pickle.dumps(layer))
    assert torch.equal(loaded(torch.ones(layer.in_features)), layer(torch.ones(layer.in_features)))
    bits = layer.weight.data.clone()
    student.to(torch.bfloat16)
    assert torch.equal(layer.weight.data, bits) and quantised_form(student) == "nf4"
    student(x, *TIMES, {key: value.bfloat16() for key, value in cond.items()})


def test_a_state_dict_holds_the_bytes(tmp_path):
    student, other = student_of("sd3", True), student_of("sd3", True, seed=1)
    base = quantise_base(student, "nf4")
    state = student.state_dict()
    name = next(n for n in state if n.startswith(base.layers[0]) and n.endswith("weight"))
    assert type(state[name]) is torch.Tensor and state[name].dtype == torch.uint8 and state[name].dim() == 1
    save_file(state, tmp_path / "state.safetensors")
    x, cond, _ = make_batch("sd3", student, 2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    quantise_base(other, "nf4")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other(x, *TIMES, cond), student(x, *TIMES, cond))


def test_the_exported_lora_is_the_same_file(tmp_path):
    plain, quantised = student_of("sd3", True), student_of("sd3", True)
    quantise_base(quantised, "nf4")
    for name, student in (("plain", plain), ("quantised", quantised)):
        export(student, tmp_path / name)
    assert contents(tmp_path / "plain") == contents(tmp_path / "quantised")


def test_adapters_and_skipped_layers_stay(tmp_path):
    export(add_lora(make_student("sd3"), rank=2, conditioning=None), tmp_path / "style")
    torch.manual_seed(0)
    student = add_lora(make_student("sd3", conditioning="dual+sign"), rank=2, base_lora=tmp_path / "style")
    EMATeacher(student, 0.9)
    others = {n: p.data.clone() for n, p in student.named_parameters() if "lora_" in n or "base_layer" not in n}
    base = quantise_base(student, "int8", device="cpu", skip=[Q, f"{Q.replace('to_q', 'to_k')}.base_layer"])
    assert not any("lora_" in name or name.startswith((Q, Q.replace("to_q", "to_k"))) for name in base.layers)
    packed = {n for n, p in student.named_parameters() if isinstance(p, PackedWeight)}
    assert f"{Q}.base_layer.weight" not in packed and f"{Q}.base_layer.weight".replace("to_q", "to_v") in packed
    assert len(packed) == len(base.layers)
    for name, parameter in student.named_parameters():
        assert name in packed or name not in others or torch.equal(parameter, others[name]), name


def test_frozen_adapters_of_plain_layers_stay():
    """As peft makes them, before a teacher or `add_lora` changes their class."""
    transformer = tiny_transformer("sd3").requires_grad_(False)
    config = LoraConfig(r=4, target_modules=["to_q"])
    transformer.add_adapter(config, "style")
    transformer.requires_grad_(False)
    transformer.add_adapter(config, "default")
    student = load(transformer)
    layer = student.get_submodule(Q)
    assert type(layer.lora_A["style"]) is nn.Linear and not layer.lora_A["style"].weight.requires_grad
    assert not any("lora_" in name for name in quantise_base(student, "int8").layers)


def test_deferred_modulation_must_be_skipped():
    student = student_of("qwen_image", True)
    handle = defer_modulation(student)
    with pytest.raises(ValueError, match=r"run their own forward, got .*mod\.1 with another's, .*; name it in skip"):
        quantise_base(student.network)
    skip = [name for name in dict(student.network.named_modules()) if name.endswith("mod.1")]
    base = quantise_base(student.network, skip=skip)
    assert not set(base.layers) & set(skip) and len(skip) == 2 * len(student.network.transformer_blocks)
    deferred = trained(student, 2, 1)
    handle.remove()
    plain = student_of("qwen_image", True)
    quantise_base(plain.network, skip=skip)
    assert_equal(deferred, trained(plain, 2, 1))


def test_a_lora_added_afterwards():
    plain = pair(lambda: student_of("sd3", True), "nf4")[1]
    torch.manual_seed(0)
    student = make_student("sd3")
    student.transformer.requires_grad_(False)
    quantise_base(student, "nf4")
    student = add_lora(student, rank=2, conditioning="dual+sign")
    assert_equal(trained(student, 2, 1), trained(plain, 2, 1))


def test_fifty_steps_leave_what_two_leave():
    student = student_of("sana", True)
    quantise_base(student, "nf4")
    teacher, criterion = EMATeacher(student, 0.9), TwinFlowLoss(TwinFlowConfig(enhanced_ratio=0, estimate_order=0))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad])
    batch = make_batch("sana", student, 1)
    counts = {}
    with selective_recompute(student, "products"):
        for step in range(50):
            criterion.backward(student, *batch, micro_batch=1, teacher=teacher)
            optimizer.step()
            optimizer.zero_grad()
            if step in (1, 49):
                counts[step] = live_storages()
    assert counts[49] <= counts[1]  # less where other tests' garbage goes


def lora():
    return student_of("sd3", True)


def replaced(change):
    student = student_of("sd3", True)
    layer = student.get_submodule(Q)
    layer.base_layer = change(layer.base_layer)
    return student


def by_torchao(layer):
    torchao.quantization.quantize_(layer, torchao.quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    return layer


def by_bitsandbytes(layer):
    return bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features)


def of_dtype(dtype):
    def change(layer):
        layer.weight.data = layer.weight.data.to(dtype)
        return layer

    return change


def on_meta():
    with torch.device("meta"):
        student = load(tiny_transformer("sd3"))
    student.requires_grad_(False)
    return student


def quantised_already(form="nf4"):
    student = student_of("sd3", True)
    quantise_base(student, form)
    return student


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lora, {"form": "fp8"}, "form must be one of nf4, int8, got 'fp8'"),
        (lora, {"skip": ["nothing"]}, "skip must name linear layers of the model, got 'nothing'"),
        (lambda: student_of("sd3", False), {}, "frozen linear layer .* got none; the base must be frozen: add a LoRA"),
        (lambda: nn.Linear(2, 2), {}, "repeated_blocks: model must hold repeated blocks"),
        (quantised_already, {}, "quantised once, got .* in nf4 already; load it again"),
        (quantised_already, {"form": "int8"}, "quantised once, got .* in nf4 already; load it again"),
        (lambda: replaced(by_torchao), {}, rf"plain floating weights, got {Q}.base_layer quantised by torchao \(Int8T"),
        (
            lambda: replaced(by_bitsandbytes),
            {},
            r"by bitsandbytes \(Params4bit in Linear4bit\); load it in bf16 and",
        ),
        (lambda: replaced(of_dtype(torch.float8_e4m3fn)), {}, "quantised by its owner, as torch.float8_e4m3fn"),
        (lambda: replaced(of_dtype(torch.float64)), {}, "float32, bfloat16 or float16, got .* in torch.float64"),
        (on_meta, {}, "must hold its weights, got .* on the meta device; load them first"),
    ],
)
def test_bad_values(make, options, message):
    model = make()
    before = {name: p._version for name, p in model.named_parameters()}, quantised_form(model)
    with pytest.raises(ValueError, match=message):
        quantise_base(model, **options)
    assert before == ({name: p._version for name, p in model.named_parameters()}, quantised_form(model))


def test_bad_types():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        quantise_base(3)
    with pytest.raises(TypeError, match="skip must be a collection of names, got 'to_q'"):
        quantise_base(student_of("sd3", True), skip="to_q")


def test_sharded_weights(one_rank):
    student = student_of("sd3", True)
    layer = student.get_submodule(Q).base_layer
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = torch.distributed.tensor.distribute_tensor(layer.weight.data, mesh)
    layer.weight = nn.Parameter(sharded, requires_grad=False)
    with pytest.raises(
        ValueError, match=rf"must hold whole weights, got {Q}.base_layer sharded; quantise before shard"
    ):
        quantise_base(student)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("form, name", [("nf4", "bitsandbytes"), ("int8", "torchao")])
def test_a_missing_library_is_named(monkeypatch, form, name):
    load_library.cache_clear()
    monkeypatch.setitem(sys.modules, name, None)
    student = student_of("sd3", True)
    with pytest.raises(
        ImportError, match=rf"quantise_base: {name} must be installed \(pip install 'twinflow\[quant\]'"
    ):
        quantise_base(student, form)
    assert quantised_form(student) is None


def test_loggers_keep_their_levels():
    load_library.cache_clear()
    logging.getLogger("torchao").setLevel(logging.INFO)
    load_library("torchao", "test")
    assert logging.getLogger("torchao").level == logging.INFO
    logging.getLogger("torchao").setLevel(logging.NOTSET)


def test_a_layer_that_something_else_multiplies_with_fails():
    """Never a product with codes as if they were weights."""
    layer = linear(quantised_already(), Q)
    with pytest.raises(RuntimeError):
        torch.ones(2, layer.in_features) @ layer.weight.t()
