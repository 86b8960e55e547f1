"""The host memory of activation offload: taken once, cut into buffers that never overlap, refused in clear words."""

import random

import pytest
import torch

from twinflow.memory.host_memory import available_host_bytes
from twinflow.memory.offload import host_pool as pinned_pool
from twinflow.memory.offload.activations import offload_activations
from twinflow.memory.offload.host_pool import GRAIN, HostPool, slab_sizes


def test_slabs_are_powers_of_two_and_waste_nothing():
    for nbytes in (GRAIN, 3 * GRAIN, 4_000_000_000 // GRAIN * GRAIN):
        sizes = slab_sizes(nbytes)
        assert sum(sizes) == nbytes and all(size & (size - 1) == 0 for size in sizes)
        assert sizes == sorted(set(sizes), reverse=True)
    assert HostPool(10 * GRAIN + 1).capacity == 10 * GRAIN and HostPool(GRAIN - 1).allocate(1) is None


@pytest.mark.parametrize("seed", range(20))
def test_buffers_hold_what_is_written_whatever_comes_and_goes(seed):
    """Random sizes in random order: bytes never overlap, a buffer fits whenever enough is free, gaps close again."""
    rng, pool, held = random.Random(seed), HostPool(37 * GRAIN), {}
    pool.take_memory(pinned=False)
    for number in range(300):
        if held and rng.random() < 0.5:
            extents, nbytes, value = held.pop(rng.choice(list(held)))
            parts = pool.parts(extents, nbytes)
            assert sum(map(len, parts)) == nbytes and all((part == value).all() for part in parts)
            pool.free(extents)
        nbytes, free = rng.randint(1, 12 * GRAIN), pool.capacity - pool.nbytes
        extents = pool.allocate(nbytes)
        assert (extents is not None) == (-(-nbytes // GRAIN) * GRAIN <= free)
        if extents is not None:
            held[number] = extents, nbytes, number % 251
            for part in pool.parts(extents, nbytes):
                part.fill_(number % 251)
    for extents, _, _ in held.values():
        pool.free(extents)
    assert pool.nbytes == 0 and pool.peak_nbytes <= pool.capacity
    assert pool.allocate(pool.capacity) == ((0, pool.capacity),)


def test_memory_is_taken_once(monkeypatch):
    taken, empty = [], torch.empty
    monkeypatch.setattr(pinned_pool.torch, "empty", lambda size, **more: taken.append(size) or empty(size, **more))
    pool = HostPool(5 * GRAIN)
    pool.take_memory(pinned=False)
    pool.take_memory(pinned=False)
    assert taken == [4 * GRAIN, GRAIN]


def test_pinned_memory_that_is_refused_names_the_way_out(monkeypatch):
    def refuses(size, *, pin_memory, **more):
        if size == GRAIN:
            raise RuntimeError("CUDA error: out of memory")
        return torch.zeros(size, dtype=torch.uint8)

    pool = HostPool(3 * GRAIN)
    monkeypatch.setattr(pinned_pool.torch, "empty", refuses)
    with pytest.raises(RuntimeError, match=r"can be pinned, got 0.000 GB.*pin_memory=False.*synchronous, about 2-4x"):
        pool.take_memory(pinned=True)
    with pytest.raises(RuntimeError, match=r"can be allocated, got 0.000 GB, refused after 0.000 GB \(CUDA"):
        pool.take_memory(pinned=False)


def test_available_memory_is_what_the_budget_is_held_to(monkeypatch):
    available = available_host_bytes()
    assert available is None or 1e6 < available < 1e14
    monkeypatch.setattr("twinflow.memory.offload.activations.available_host_bytes", lambda: 2_000_000_000)
    with pytest.raises(ValueError, match=r"at most the host memory available, 2\.0 GB, got 3$"):
        offload_activations(3)
    offload_activations(3, device="meta")
    monkeypatch.setattr("twinflow.memory.offload.activations.available_host_bytes", lambda: None)
    offload_activations(3)


def test_a_containers_limit_counts(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    assert available_host_bytes(tmp_path / "meminfo", tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    assert available_host_bytes(tmp_path / "meminfo", tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("10000\n")
    assert available_host_bytes(tmp_path / "meminfo", tmp_path) == 7000
    assert available_host_bytes(tmp_path / "none", tmp_path / "none") is None
