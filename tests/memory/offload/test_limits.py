"""What activation offload takes and leaves, to the byte; what it refuses, and how it says so."""

import pytest
import torch
from helpers.offload_cases import KB, copies, drained, kept, make, rows
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from twinflow.memory.offload.activations import offload_activations

# What is taken.


def test_views_come_back_as_they_were_from_one_copy(transfers):
    base = rows(6)
    views = [
        base, base.t(), *base.chunk(2, 1), base.as_strided((5, 3), (7, 1), 11), base[:4].expand(2, 4, -1),
        base.view(torch.int32), base.view(torch.bfloat16)[:, 1::2], base.flatten()[1:],
    ]  # fmt: skip
    expected, offload = [view.clone() for view in views], make(in_flight_bytes=0)
    shapes = [(view.shape, view.stride(), view.dtype) for view in views]
    out, seen = kept(offload, *views)
    assert offload.stats.pool_bytes == (6 + 1) * KB, "the storage once, and the short span by itself"
    del base, views
    out.backward(retain_graph=True)
    assert [(view.shape, view.stride(), view.dtype) for view in seen[0]] == shapes
    assert all(map(torch.equal, seen[0], expected))
    assert len({view.untyped_storage()._cdata for view in seen[0]}) == 2, "restored storages are shared as well"
    stats = offload.stats
    assert (stats.tensors, stats.deduplicated) == (9, 7)
    span = 4 * (4 * 7 + 2 + 1)
    assert stats.bytes_offloaded == stats.bytes_restored == 6 * KB + span and stats.bytes_kept == 0
    seen.clear()
    out.backward()
    assert all(map(torch.equal, seen[0], expected)) and offload.stats.bytes_restored == 2 * stats.bytes_restored


def test_a_storage_at_a_later_version_is_another_copy(transfers):
    x, offload = rows(1), make(in_flight_bytes=0)
    first, seen = kept(offload, x)
    x.mul_(2)
    expected = x.clone()
    second, seen = kept(offload, x)
    assert offload.stats.deduplicated == 0 and offload.stats.pool_bytes == 2 * KB
    del x
    second.backward()
    assert torch.equal(seen[0][0], expected)
    with pytest.raises(RuntimeError, match="inplace operation"):
        first.backward()


def test_what_someone_still_holds_is_not_copied_back(transfers):
    x, offload = rows(1), make(in_flight_bytes=0)
    out, seen = kept(offload, x)
    out.backward()
    assert seen[0][0].data_ptr() == x.data_ptr() and offload.stats.bytes_restored == 0


def test_the_budget_is_kept_to_the_byte(transfers):
    """Five of seven fit; the others stay; a freed buffer takes a tensor in pieces where no gap is large enough."""
    offload = make(5 * KB / 1e9, in_flight_bytes=0)
    held = [kept(offload, rows(1)) for _ in range(7)]
    stats = offload.stats
    assert (stats.pool_bytes, stats.peak_pool_bytes, stats.bytes_kept, stats.tensors) == (5 * KB, 5 * KB, 2 * KB, 5)
    del held[1], held[2]
    wanted = rows(2)
    expected = wanted.clone()
    out, seen = kept(offload, wanted, wanted.t())
    del wanted
    assert offload.stats.pool_bytes == 5 * KB and offload.stats.bytes_kept == 2 * KB
    more = rows(1)
    kept_out, _ = kept(offload, more, more.t())
    assert offload.stats.bytes_kept == 3 * KB, "a storage that stays is counted once"
    out.backward()
    assert torch.equal(seen[0][0], expected)
    del held, out, seen, kept_out
    assert drained(offload) and offload.stats.peak_pool_bytes == 5 * KB


class Marked(torch.Tensor):
    pass


def test_parameters_and_all_that_is_no_plain_activation_stay(transfers):
    weight, frozen, leaf = nn.Parameter(rows(2)), nn.Parameter(rows(2), requires_grad=False), rows(2).requires_grad_()
    saved = [
        weight, weight.t(), frozen, frozen[1:].t(), leaf, leaf[0], rows(1).as_subclass(Marked), rows(1).to_sparse(),
        torch.view_as_complex(rows(2).view(-1, 2)).conj(), rows(1)[:0], torch.empty(KB, device="meta"),
    ]  # fmt: skip
    offload = make(device="cpu")
    out, seen = kept(offload, *saved)
    assert offload.stats.tensors == 0 and offload.stats.bytes_kept == 0
    out.backward()
    for given, got in zip(saved, seen[0], strict=True):
        assert isinstance(got, Marked) == isinstance(given, Marked)
        assert got.layout == given.layout and got.device == given.device
        assert got.layout is not torch.strided or got.device.type == "meta" or got.data_ptr() == given.data_ptr()
    small, large = make(min_bytes=KB + 1), make(min_bytes=KB)
    _ = kept(small, rows(1)), kept(large, rows(1))
    assert (small.stats.tensors, large.stats.tensors) == (0, 1)


def test_an_attached_modules_buffers_stay():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.scale * self.weight.detach()

    module, offload = Scaled(32, 32), make()
    module.register_buffer("scale", torch.rand(32, 32))
    x = torch.randn(32, 32) * 1
    offload.attach(module)
    module(x).sum().backward()
    assert offload.stats.tensors == 1, "the input alone"


@pytest.mark.parametrize("where", ["pool", "window", "kept", "small", "parameter"])
def test_a_tensor_modified_after_it_was_saved_is_an_error_as_without_offload(where, transfers):
    offload = make(1e-9 if where == "kept" else 0.01, in_flight_bytes=KB if where == "window" else 0,
                   min_bytes=2 * KB if where == "small" else 0)  # fmt: skip
    for context in (torch.enable_grad(), offload):
        x, weight = rows(1), nn.Parameter(rows(1))
        y = x * weight
        with context:
            out = (y * weight).sum() if where == "parameter" else y.exp().sum() * (y * y).sum()
        with torch.no_grad():
            (weight if where == "parameter" else y.view(-1)).mul_(2)
        with pytest.raises(RuntimeError, match="inplace operation"):
            out.backward()
    assert (offload.stats.tensors > 0) == (where in ("pool", "window", "parameter"))


# How much is on the device.


def alive(storages):
    return sum(not storage.expired() for storage in storages)


def test_on_meta_the_window_is_what_stays():
    """A chain of results: while it is saved three stay in flight, while it comes back three are there early."""
    offload = offload_activations(1e3, min_bytes=0, in_flight_bytes=3 * KB, device="meta")
    x, storages, counts = torch.empty(KB // 4, device="meta", requires_grad=True), [], []
    with offload:
        y = x
        for _ in range(20):
            y = y.exp()
            storages.append(StorageWeakRef(y.untyped_storage()))
            y.register_hook(lambda _: counts.append(alive(storages)))
    assert alive(storages) == 3 and offload.stats.bytes_offloaded == offload.stats.pool_bytes == 20 * KB
    loss = y.sum()
    del y
    loss.backward()
    assert alive(storages) == 0 and max(counts) <= 3 and offload.stats.bytes_restored == 17 * KB
    assert x.grad.shape == x.shape and drained(offload)


def chain(offload, late, length):
    """The sum after so many exponentials, whose results are saved."""
    y = rows(1).requires_grad_()
    with offload:
        for _ in range(length):
            y = y.exp()
            y.register_hook(lambda _: late.log.append("node"))
        return y.sum()


@pytest.mark.parametrize("window", [0, 1, 4])
def test_backward_brings_back_early_what_the_window_holds(window, monkeypatch):
    late = next(copies("late", monkeypatch))
    offload = make(in_flight_bytes=window * KB)
    loss = chain(offload, late, 20)
    loss.backward(retain_graph=True)
    assert late.peak <= (window + 1) * KB and len(late.loads) == 20 - window and not late.errors
    assert late.early() == (20 - window if window else 0)
    loss.backward()
    assert late.peak <= (window + 1) * KB and len(late.loads) == 2 * 20 - window and not late.errors
    assert late.early() == (2 * 20 - window - 1 if window else 0), "all but the first of the second time"


def test_a_dropped_graph_leaves_the_window_to_others(monkeypatch):
    late = next(copies("late", monkeypatch))
    offload = make(in_flight_bytes=4 * KB)
    loss, dropped = chain(offload, late, 20), chain(offload, late, 4)
    del dropped
    loss.backward()
    assert len(late.loads) == 20 and late.early() == 19 and not late.errors


# Errors.


@pytest.mark.parametrize("arguments, error, message", [
    (dict(budget_gb=0), ValueError, "budget_gb must be > 0, got 0"),
    (dict(budget_gb=-1.5), ValueError, "budget_gb must be > 0, got -1.5"),
    (dict(budget_gb=float("nan")), ValueError, "budget_gb must be > 0, got nan"),
    (dict(budget_gb="4"), TypeError, "budget_gb must be a number, got str"),
    (dict(budget_gb=True), TypeError, "budget_gb must be a number, got bool"),
    (dict(budget_gb=1e6), ValueError, r"budget_gb must be at most the host memory available, [\d.]+ GB, got 1e\+06"),
    (dict(budget_gb=1, min_bytes=-1), ValueError, "min_bytes must be an integer >= 0, got -1"),
    (dict(budget_gb=1, in_flight_bytes=1.5), ValueError, "in_flight_bytes must be an integer >= 0, got 1.5"),
    (dict(budget_gb=1, device="mps"), ValueError, "device must be cuda, cpu, meta or None, got mps"),
])  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"offload_activations: {message}"):
        offload_activations(**arguments)


def test_a_module_that_moves_is_an_error_that_names_both_devices():
    net, x, offload = nn.Linear(32, 32), torch.randn(32, 32), make()
    with offload:
        net(x)
    with pytest.raises(RuntimeError, match="must be on cpu, as the first one was, got one on meta"), offload:
        net.to("meta")(x.to("meta"))
    handle = offload.attach(net)
    with pytest.raises(RuntimeError, match="module must be on cpu, whose tensors are offloaded, got it on meta"):
        net(x)
    with torch.no_grad():
        assert net(x.to("meta")).device.type == "meta"
    net.to_empty(device="cpu")(x).sum().backward()
    handle.remove()
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got function"):
        offload.attach(lambda x: x)
