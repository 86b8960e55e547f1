"""The host memory of activation offload: taken once, cut into buffers that never overlap, refused in clear words."""

import random

import pytest
import torch

from twinflow.memory.offload import host_pool
from twinflow.memory.offload.activations import offload_activations
from twinflow.memory.offload.host_pool import GRAIN, HostPool, available_host_bytes


def test_slabs_are_powers_of_two_and_waste_nothing():
    for nbytes in (GRAIN, 3 * GRAIN, 10 * GRAIN + 1):
        sizes = [len(slab) for slab in HostPool(nbytes, pinned=False)._slabs]
        assert sum(sizes) == nbytes // GRAIN * GRAIN and all(size & (size - 1) == 0 for size in sizes)
        assert sizes == sorted(set(sizes), reverse=True)
    assert HostPool(GRAIN - 1, pinned=None).allocate(1) is None


@pytest.mark.parametrize("seed", range(20))
def test_buffers_hold_what_is_written_whatever_comes_and_goes(seed):
    """Random sizes in random order: bytes never overlap, a buffer fits whenever enough is free, gaps close again."""
    rng, pool, held = random.Random(seed), HostPool(37 * GRAIN, pinned=False), {}
    for number in range(300):
        if held and rng.random() < 0.5:
            buffer, value = held.pop(rng.choice(list(held)))
            assert all((part == value).all() for part in pool.parts(buffer))
            pool.free(buffer)
        nbytes, free = rng.randint(1, 12 * GRAIN), pool.capacity - pool.nbytes
        buffer = pool.allocate(nbytes)
        assert (buffer is not None) == (-(-nbytes // GRAIN) * GRAIN <= free)
        if buffer is not None:
            held[number] = buffer, number % 251
            assert 0 <= sum(map(len, pool.parts(buffer))) - nbytes < GRAIN
            for part in pool.parts(buffer):
                part.fill_(number % 251)
    for buffer, _ in held.values():
        pool.free(buffer)
    assert pool.nbytes == 0 and pool.peak_nbytes <= pool.capacity
    assert pool.allocate(32 * GRAIN) == [(0, 0, 32 * GRAIN)], "in one piece where a gap is large enough"


def test_host_memory_that_is_refused_names_the_way_out(monkeypatch):
    def refuses(size, *, pin_memory, **more):
        if size == GRAIN:
            raise RuntimeError("CUDA error: out of memory")
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(host_pool.torch, "empty", refuses)
    for pinned, parts in (
        (True, r"0.000 GB .* must be pinned, got a refusal after 0.000 GB; .*pin_memory=False.* about 2-4x"),
        (False, r"0.000 GB .* must be allocated, got a refusal after 0.000 GB \(CUDA"),
    ):
        with pytest.raises(RuntimeError, match=parts):
            HostPool(3 * GRAIN, pinned)


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
