"""Weights that stay in host memory: the slabs they lie in, and how they visit a device."""

import io
import types

import pytest
import torch
from torch import nn

from twinflow.memory.modulation import streamed_weights
from twinflow.memory.modulation.streamed_weights import GRAIN, StreamedWeights, slabs


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
    assert not weights._places


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


@pytest.mark.parametrize("sizes, largest, expected", [
    ([64], 1 << 32, [(64, [0])]),
    ([65], 1 << 32, [(128, [0])]),
    ([48, 48, 48], 128, [(128, [0, 1]), (64, [2])]),
    ([300, 10], 128, [(512, [0, 1])]),
])  # fmt: skip
def test_slabs(sizes, largest, expected):
    assert slabs(sizes, largest) == expected


def test_slabs_of_qwen_image_waste_little():
    sizes = [(3072 * 18432 + 18432) * 2] * 120 + [(3072 * 6144 + 6144) * 2]
    found = slabs(sizes)
    assert sorted(n for _, numbers in found for n in numbers) == list(range(121))
    assert sum(size for size, _ in found) < 1.05 * sum(sizes)


def taken(layers, monkeypatch) -> StreamedWeights:
    """In slabs as for a CUDA device, without pinning."""
    weights = StreamedWeights(layers, torch.device("cpu"))
    monkeypatch.setattr(torch, "empty", lambda *a, empty=torch.empty, **k: empty(*a, **{**k, "pin_memory": False}))
    weights._take_memory()
    return weights


def test_saved_parameters_are_no_slabs(monkeypatch):
    layers = nn.ModuleList(nn.Linear(8, 16, dtype=torch.bfloat16) for _ in range(5))
    size = len(saved(layers[2].state_dict()))
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    weights = taken(layers, monkeypatch)
    assert all(p.untyped_storage().nbytes() == p.numel() * 2 for p in layers.parameters())
    assert len(saved(layers[2].state_dict())) == size
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    places = [p.data_ptr() for p in layers.parameters()]
    weights.bring_back()
    weights.bring_back()
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    assert not set(places) & {p.data_ptr() for p in layers.parameters()}


def saved(state) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def test_a_pass_that_ends_early_waits_for_its_copy(monkeypatch):
    """Else the buffers would go to others while a copy into them is under way."""
    weights = taken([nn.Linear(8, 16) for _ in range(4)], monkeypatch)
    waited = []
    monkeypatch.setattr(weights._transfers, "load", lambda buffer, parts, saved: parts[0])
    monkeypatch.setattr(weights._transfers, "ready", waited.append)
    weights._device = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch, "empty", lambda *a, empty=torch.empty, **k: empty(*a, **{**k, "device": "cpu"}))
    with pytest.raises(ZeroDivisionError):
        for _ in weights.sweep():
            1 / 0  # noqa: B018
    assert waited[-1] is weights._places[1][-1], "the second layer's copy was under way"
