"""Deferred modulation: what it refuses, what it leaves behind, what it saves, and how weights visit a device."""

import copy
import gc
import types

import pytest
import torch
from deferred_cases import FAMILIES, assert_equal, student_of, trained
from family_batches import make_batch, make_student
from safetensors.torch import load_file
from test_memory_together import fail_once, live_storages
from tiny_pipelines import tiny_transformer
from torch import distributed, nn

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.export import export
from twinflow.lora import add_lora
from twinflow.memory import streamed_weights
from twinflow.memory.deferred import defer_modulation
from twinflow.memory.streamed_weights import GRAIN, StreamedWeights, slabs
from twinflow.models import load


def backward_once(student, **options) -> None:
    torch.manual_seed(1)
    criterion = TwinFlowLoss(TwinFlowConfig(enhanced_ratio=0, estimate_order=0))
    criterion.backward(student, *make_batch(student.family, student, 2), **options)


def test_fifty_steps_leave_what_two_leave():
    student = student_of("qwen_image")
    teacher, criterion = EMATeacher(student, 0.9), TwinFlowLoss()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad])
    batch, counts = make_batch("qwen_image", student, 2), {}
    with defer_modulation(student):
        for step in range(50):
            if step % 2:
                criterion.backward(student, *batch, teacher=teacher)
            else:
                criterion(student, *batch, teacher=teacher).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in (1, 49):
                counts[step] = live_storages()
    assert counts[49] == counts[1]


@pytest.mark.parametrize("when", ["forward", "backward", "rehearsal"])
def test_an_exception_in_the_middle_leaves_the_model_usable(when):
    plain = trained(student_of("qwen_image"), 2)
    student = student_of("qwen_image")
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    with defer_modulation(student):
        if when == "rehearsal":
            embedder = student.network.time_text_embed.timestep_embedder
            breaking = embedder.register_forward_pre_hook(lambda *_: 1 / 0)
        elif when == "forward":
            breaking = student.network.transformer_blocks[1].register_forward_hook(fail_once("forward"))
        else:
            breaking = student.network.transformer_blocks[1].register_full_backward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            backward_once(student)
        breaking.remove()
        student.zero_grad()
        assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
        assert_equal(trained(student, 2), plain)


def test_removing_leaves_the_model_as_it_was():
    student = student_of("flux")
    kept = {name: (id(p), p.data_ptr()) for name, p in student.named_parameters()}
    hooks = len(student.network.time_text_embed._forward_hooks)
    deferred = defer_modulation(student)
    deferred.remove()
    deferred.remove()
    assert {name: (id(p), p.data_ptr()) for name, p in student.named_parameters()} == kept
    assert len(student.network.time_text_embed._forward_hooks) == hooks and student.deferral is None
    assert not any("forward" in vars(m) or "_apply" in vars(m) for m in student.modules())
    student.to(torch.float64)
    defer_modulation(student)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_the_same_file(family, tmp_path):
    for name in ("plain", "deferred"):
        student = student_of(family, "dual+sign")
        if name == "deferred":
            defer_modulation(student)
        trained(student, 1)
        export(student, tmp_path / name)
        whole = make_student(family)
        if name == "deferred":
            defer_modulation(whole.requires_grad_(False))
        whole.network.save_pretrained(tmp_path / name / "whole")
    written = sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*.safetensors"))
    assert len(written) >= 2
    for path in written:
        saved = [load_file(tmp_path / name / path) for name in ("plain", "deferred")]
        assert saved[0].keys() == saved[1].keys() and len(saved[0])
        if path.parts[0] != "whole":  # the untrained models differ by their seed
            assert_equal(*saved)


def test_the_state_dict_is_the_models_own():
    student = student_of("z_image")
    plain = {name: value.clone() for name, value in student.state_dict().items()}
    with defer_modulation(student):
        assert_equal(dict(student.state_dict()), plain)
        student.load_state_dict({name: value + 1 for name, value in plain.items()})
    assert torch.equal(student.network.layers[0].adaLN_modulation[0].weight,
                       plain["transformer.layers.0.adaLN_modulation.0.weight"] + 1)  # fmt: skip


def with_lora_on(*targets):
    return add_lora(make_student("qwen_image"), rank=2, targets=targets)


def changed(change):
    student = student_of("sd3")
    change(student)
    return student


def as_quantised(student):
    student.network.norm_out.linear.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: nn.Linear(2, 2), TypeError, "student must be from twinflow.models.load, got Linear"),
        (lambda: student_of("sana"), ValueError, "modulation layers that read its time embedding, got sana without"),
        (lambda: make_student("sd3"), ValueError,
         r"modulation must be frozen, got training of transformer_blocks\.0\.norm1\.linear and 4 more; leave"),
        (lambda: with_lora_on("txt_mod.1", "to_q"), ValueError,
         r"must be frozen, got training of transformer_blocks\.0\.txt_mod\.1 and 1 more; leave .* or do without"),
        (lambda: with_lora_on("norm_out.linear").requires_grad_(False), ValueError,
         r"plain linear layers, got Linear at norm_out\.linear; quantise after deferring, and merge an adapter"),
        (lambda: changed(as_quantised), ValueError, r"plain linear layers, got Linear at norm_out\.linear"),
        (lambda: changed(defer_modulation), ValueError, "must not be deferred yet, got one that is"),
    ],
)  # fmt: skip
def test_students_that_cannot_be_deferred(make, error, message):
    student = make()
    with pytest.raises(error, match=message):
        defer_modulation(student)


def test_two_embeddings_a_row_are_refused():
    student = load(tiny_transformer("qwen_image", zero_cond_t=True).requires_grad_(False))
    with pytest.raises(ValueError, match="must have one time embedding a row, got an edit model with two"):
        defer_modulation(student)


def test_sharded_models_are_refused(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student = student_of("sd3")
        layer = student.network.proj_out
        mesh = distributed.init_device_mesh("cpu", (1,))
        layer.weight = nn.Parameter(distributed.tensor.distribute_tensor(layer.weight.data, mesh), requires_grad=False)
        with pytest.raises(ValueError, match="must be whole on its device, got a sharded model"):
            defer_modulation(student)
    finally:
        distributed.destroy_process_group()


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device must be cuda or cpu where the student has data, got xpu"):
        defer_modulation(student_of("sd3"), device="xpu")


@pytest.mark.parametrize(
    "move",
    [lambda s: s.to(torch.float64), lambda s: s.network.half(), lambda s: s.transformer.to("meta"),
     lambda s: s.network.norm_out.linear.double()],
)  # fmt: skip
def test_moving_and_casting_are_refused(move):
    student = student_of("sd3")
    plain = trained(student_of("sd3"), 1)
    with defer_modulation(student):
        with pytest.raises(
            RuntimeError, match=r"must stay on cpu and in its dtype .* got a change to .*; remove\(\) the"
        ):
            move(student)
        assert student.to("cpu") is student and student.network.float() is student.network  # as accelerate prepares
        assert_equal(trained(student, 1), plain)


def test_a_change_that_adapters_alone_would_feel_is_refused():
    student = student_of("sd3", dtype=torch.bfloat16)
    with defer_modulation(student), pytest.raises(RuntimeError, match=r"got a change to torch\.bfloat16 on cpu"):
        student.to(torch.bfloat16)


def test_ddp_passes_over_the_weights():
    """They are on another device than the rest, which its wrapper would refuse."""
    student = student_of("sd3")
    names = {
        n for n in dict(student.named_parameters()) if "norm1.linear" in n or "norm1_context" in n or "norm_out" in n
    }
    with defer_modulation(student):
        assert set(student._ddp_params_and_buffers_to_ignore) == names and len(names) == 10
    assert not hasattr(student, "_ddp_params_and_buffers_to_ignore")


def test_a_later_lora_on_the_modulation_is_refused():
    student = student_of("qwen_image")
    with defer_modulation(student):
        add_lora(student, rank=2, targets=("img_mod.1",), adapter="more")
        with pytest.raises(ValueError, match=r"transformer_blocks\.0\.img_mod\.1 must stay frozen and without adapter"):
            backward_once(student)


def test_a_teacher_made_before_is_refused():
    """Its copy of the module would compute modulation from weights that are elsewhere by then."""
    student = make_student("qwen_image", "dual")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("attn" in name or "_2." in name)
    teacher = EMATeacher(student, 0.9)
    with (
        defer_modulation(student),
        pytest.raises(ValueError, match=r"the teacher must compute with the model .* make the teacher after deferring"),
    ):
        TwinFlowLoss().backward(student, *make_batch("qwen_image", student, 4), teacher=teacher)


@pytest.mark.parametrize(
    "rows, message",
    [(1, "in order, got a call with 1 rows of other times where student with 2"), (2, "got a call with 2 rows"),
     (0, "must make the calls of its plan, got one more")],
)  # fmt: skip
def test_calls_beside_the_plan_are_refused(rows, message):
    student = student_of("qwen_image")
    defer_modulation(student)
    x, cond, _ = make_batch("qwen_image", student, 2)

    def call(rows):
        t = torch.full((rows,), 0.01)
        student(x[:rows], t, t, {name: value[:rows] for name, value in cond.items()})

    blocks = student.network.transformer_blocks
    # Before the planned call has its embedding, or in the middle of the last planned call.
    place = student.network.img_in if rows else blocks[1]
    extra = place.register_forward_pre_hook(lambda *_: beside())
    waiting = [False, True] if rows else [True]  # the rehearsal passes the first place too, and not the blocks

    def beside():
        if waiting and waiting.pop(0):
            call(rows or 2)

    config = TwinFlowConfig(enhanced_ratio=0, estimate_order=0, adversarial=False, shares={"mul": 1.0})
    with pytest.raises(RuntimeError, match=message):
        TwinFlowLoss(config)(student, x, cond)
    extra.remove()
    with torch.no_grad():
        call(2)


def test_too_little_host_memory(monkeypatch):
    layers = [nn.Linear(32, 64)]
    weights = StreamedWeights(layers, torch.device("cpu"))
    monkeypatch.setattr(streamed_weights, "available_host_bytes", lambda: 100)
    message = r"host must have 0\.0 GB of memory available for the modulation weights, got 0\.0 GB"
    with pytest.raises(ValueError, match=message):
        weights._take_memory()


@pytest.mark.parametrize("pinned", [True, False])
def test_memory_refused_by_the_system(pinned, monkeypatch):
    layers = [nn.Linear(32, 64) for _ in range(9)]
    before = [layer.weight.detach().clone() for layer in layers]
    weights = StreamedWeights(layers, torch.device("cpu"), pinned)
    empty = torch.empty

    def refusing(*size, **options):
        if options.get("dtype") is torch.uint8 and size[0] < 1 << 15:  # the second slab
            raise RuntimeError("CUDA error: out of memory")
        return empty(*size, **{name: value for name, value in options.items() if name != "pin_memory"})

    monkeypatch.setattr(torch, "empty", refusing)
    instead = "pass pin_memory=False, which takes pageable memory: copies are then synchronous" if pinned else ""
    with pytest.raises(RuntimeError, match=rf"host memory must be {'pinned' if pinned else 'allocated'}.*{instead}"):
        weights._take_memory()
    assert all(torch.equal(layer.weight, value) for layer, value in zip(layers, before, strict=True))
    assert not weights._slabs and not weights._places


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_weights_visit_in_order_through_two_buffers(bias, reverse, monkeypatch):
    """The path of a CUDA device, with the CPU's own copies."""
    torch.manual_seed(0)
    layers = [nn.Linear(8 + i, 16 + i, bias=bias, dtype=torch.bfloat16) for i in range(5)]
    before = [[p.detach().clone() for p in layer.parameters()] for layer in layers]
    weights = StreamedWeights(layers, torch.device("cpu"))
    monkeypatch.setattr(torch, "empty", lambda *a, empty=torch.empty, **k: empty(*a, **{**k, "pin_memory": False}))
    weights._take_memory()
    weights._device = types.SimpleNamespace(type="cuda")  # what decides that weights are copied
    monkeypatch.setattr(torch, "empty", lambda *a, empty=torch.empty, **k: empty(*a, **{**k, "device": "cpu"}))
    seen, memory = [], set()
    for number, weight, added in weights.sweep(reverse):
        found = [weight] if added is None else [weight, added]
        assert all(map(torch.equal, found, before[number])) and len(found) == 1 + bias
        seen.append(number)
        memory.add(weight.untyped_storage().data_ptr())
    assert seen == (list(range(5))[::-1] if reverse else list(range(5)))
    assert len(memory) == 2 and not memory & {p.untyped_storage().data_ptr() for x in layers for p in x.parameters()}
    for layer, values in zip(layers, before, strict=True):
        assert all(map(torch.equal, layer.parameters(), values))
        assert all(p.storage_offset() * p.element_size() % GRAIN == 0 for p in layer.parameters())


@pytest.mark.parametrize(
    "sizes, largest, expected",
    [
        ([64], 1 << 32, [(64, [0])]),
        ([65], 1 << 32, [(128, [0])]),
        ([48, 48, 48], 128, [(128, [0, 1]), (64, [2])]),
        ([300, 10], 128, [(512, [0, 1])]),
    ],
)
def test_slabs(sizes, largest, expected):
    assert slabs(sizes, largest) == expected


def test_slabs_of_qwen_image_waste_little():
    sizes = [(3072 * 18432 + 18432) * 2] * 120 + [(3072 * 6144 + 6144) * 2]
    found = slabs(sizes)
    assert sorted(n for _, numbers in found for n in numbers) == list(range(121))
    assert sum(size for size, _ in found) < 1.05 * sum(sizes)


def test_sizes_are_those_of_qwen_image():
    """13.6 GB in host memory, 4.4 MB a row: two six-fold layers of each of 60 blocks, and the last norm's."""
    import diffusers

    with torch.device("meta"):
        network = diffusers.QwenImageTransformer2DModel().to(torch.bfloat16).requires_grad_(False)
    deferred = defer_modulation(load(network))
    assert deferred.host_bytes == 2 * (120 * 6 + 2) * 3072 * (3072 + 1) == 13_631_729_664
    assert deferred.row_bytes == 2 * (120 * 6 + 2) * 3072 == 4_435_968
    assert str(deferred) == "modulation deferred: 121 layers, 13.63 GB in host memory, 4.44 MB a row on meta"


def test_a_forecasts_device_is_for_forecasts():
    with pytest.raises(ValueError, match="device must be cuda or cpu where the student has data, got meta"):
        defer_modulation(student_of("sd3"), device="meta")


def test_a_copy_of_the_model_shares_the_weights():
    student = student_of("sd3")
    deferred = defer_modulation(student)
    frozen = {id(p): p for p in student.parameters() if not p.requires_grad}
    other = copy.deepcopy(student, memo=dict(frozen))
    assert other.deferral is deferred
    assert other.network.norm_out.linear.weight is student.network.norm_out.linear.weight
    x, cond, _ = make_batch("sd3", student, 2)
    t = torch.tensor([0.2, 0.8])
    with torch.no_grad():
        assert torch.equal(other(x, t, t, cond), student(x, t, t, cond))
    del other
    gc.collect()
