"""8-bit Adam: near AdamW, resumed with the same bits, states of the size that is documented."""

import io
import sys

import pytest
import torch
from helpers.family_batches import make_batch
from helpers.memory_cases import student_of
from helpers.optimizer_cases import parameters, run
from torch import nn

from twinflow import EMATeacher, TwinFlowLoss
from twinflow.memory.adamw_8bit import adamw_8bit
from twinflow.memory.planner.simulation.static_memory import BLOCKWISE
from twinflow.memory.quantised_linear import load_library

LIBRARIES = ("bitsandbytes", "torchao")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """torchao compiles its step, which takes ten seconds here; the same operations without."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda f: f))


@pytest.mark.parametrize("library", LIBRARIES)
def test_updates_are_near_those_of_adamw(library):
    weights, plain, start = parameters(), parameters(), parameters()
    settings = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-7, weight_decay=0.1)
    run(weights, adamw_8bit(weights, library=library, **settings), range(10))
    run(plain, torch.optim.AdamW(plain, **settings), range(10))
    for mine, theirs, before in zip(weights, plain, start, strict=True):
        difference = ((mine - theirs).norm() / (theirs - before).norm()).item()
        quantised = mine.numel() >= 4096 and (library == "bitsandbytes" or mine.numel() % 256 == 0)
        assert 1e-3 < difference < 0.05 if quantised else difference < 1e-4


@pytest.mark.parametrize("library", LIBRARIES)
def test_resumed_from_a_file_with_the_same_bits(library):
    weights = parameters()
    optimizer = adamw_8bit(weights, lr=1e-2, library=library)
    run(weights, optimizer, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(weight.detach().clone()) for weight in weights]
    other = adamw_8bit(resumed, lr=1.0, library=library)
    other.load_state_dict(torch.load(file, weights_only=True))
    run(weights, optimizer, range(5, 10))
    run(resumed, other, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


def state_bytes(state: dict) -> dict[str, int]:
    """Bytes of each tensor in a parameter's state, torchao's in their parts."""
    found = {}
    for name, value in state.items():
        if hasattr(value, "codes"):
            found |= {f"{name}.{part}": getattr(value, part) for part in ("codes", "scale", "qmap")}
        elif isinstance(value, torch.Tensor):
            found[name] = value
    return {name: tensor.numel() * tensor.element_size() for name, tensor in found.items()}


def test_sizes_of_states():
    """Tables of 256 values apart, which bitsandbytes shares between all parameters on a device and torchao does not."""
    for library in LIBRARIES:
        weights = parameters()
        optimizer = adamw_8bit(weights, library=library)
        run(weights, optimizer, range(1))
        for weight in weights:
            count, sizes = weight.numel(), state_bytes(optimizer.state[weight])
            tables = [sizes.pop(name) for name in [*sizes] if "qmap" in name]
            sizes.pop("step", None)
            quantised = count >= 4096 and (library == "bitsandbytes" or count % BLOCKWISE == 0)
            assert sum(sizes.values()) == 2 * (count + 4 * -(-count // BLOCKWISE) if quantised else 4 * count)
            assert tables == ([1024, 1024] if quantised else [])


def test_a_student_is_trained():
    student = student_of("qwen_image", True)
    trained = [p for p in student.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer, criterion = adamw_8bit(trained, lr=1e-3), TwinFlowLoss()
    batch, teacher = make_batch("qwen_image", student, 2), EMATeacher(student, 0.9)
    for _ in range(2):
        criterion.backward(student, *batch, micro_batch=1, teacher=teacher)
        optimizer.step()
        optimizer.zero_grad()
    assert sum(not torch.equal(a, b) for a, b in zip(before, trained, strict=True)) > len(trained) // 2


def test_groups_and_generators():
    few, many = parameters()[:1], parameters()[1:]
    groups = [{"params": few, "lr": 0.5}, {"params": many}]
    assert [group["lr"] for group in adamw_8bit(groups, lr=0.1).param_groups] == [0.5, 0.1]
    assert len(adamw_8bit(p for p in many).param_groups[0]["params"]) == len(many)


@pytest.mark.parametrize("given, options, error, message", [
    (parameters, {"library": "apex"}, ValueError, "library must be one of bitsandbytes, torchao, got 'apex'"),
    (list, {}, ValueError, "parameters must be one or more, got none"),
    (lambda: [{"params": []}], {}, ValueError, "parameters must be one or more, got none"),
    (lambda: [3], {}, TypeError, "parameters must be tensors or groups of them, got int"),
    (lambda: [torch.empty(2, device="meta")], {}, ValueError, "parameters must be on cpu, cuda, xpu, got one on meta"),
])  # fmt: skip
def test_bad_values(given, options, error, message):
    with pytest.raises(error, match=f"adamw_8bit: {message}"):
        adamw_8bit(given(), **options)


def test_sharded_parameters(one_rank):
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = nn.Parameter(torch.distributed.tensor.distribute_tensor(torch.ones(4, 4), mesh))
    with pytest.raises(ValueError, match="library must be 'torchao' for sharded parameters, got 'bitsandbytes'"):
        adamw_8bit([sharded])


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_library_is_named(monkeypatch, library):
    load_library.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"adamw_8bit: {library} must be installed \(pip install 'twinflow"):
        adamw_8bit(parameters(), library=library)
