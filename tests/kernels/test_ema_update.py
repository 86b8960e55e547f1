"""`ema_update_`: every backend against the reference in float64, contracts, properties."""

import itertools

import numpy as np
import pytest
import torch
from helpers.kernel_checks import DTYPES, assert_accurate, backends, interpreted, strided

from twinflow_kernels import _backend, ema_update_
from twinflow_kernels import ema_update as kernel

BACKENDS = backends(kernel._operation)
ALL_DTYPES = (*DTYPES, torch.float64)
SIZES = (0, 1, 2, 7, 15, 16, 17, 63, 127, 1023, 1024, 1025, 2049, 4099)
NAN = float("nan")


def pairs(sizes, target_dtype=torch.float32, source_dtype=torch.float32, device="cpu"):
    targets = [torch.randn(n, device=device).to(target_dtype) for n in sizes]
    return targets, [torch.randn(n, device=device).to(source_dtype) for n in sizes]


def clones(tensors):
    return [None if x is None else x.clone() for x in tensors]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("target_dtype, source_dtype", list(itertools.product(ALL_DTYPES, ALL_DTYPES)))
def test_accuracy(backend, device, target_dtype, source_dtype):
    targets, sources = pairs(SIZES, target_dtype, source_dtype, device)
    before = clones(targets)
    with _backend.override(backend):
        assert ema_update_(targets, sources, 0.9) is None
    for old, source, new in zip(before, sources, targets, strict=True):
        exact = kernel.ema_update_ref(old.double(), source.double(), 0.9)
        assert_accurate(new, exact, kernel.ema_update_ref(old, source, 0.9), backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("copy_dtype", ALL_DTYPES)
def test_copies_hold_the_new_value(backend, device, copy_dtype):
    """Also at decay 1, where targets stay; a target whose copy is None has none."""
    for decay in (0.0, 0.7, 1.0):
        targets, sources = pairs((3, 1025, 0, 40, 7), device=device)
        targets[1] = targets[1].double()
        targets[3] = targets[3].bfloat16()
        copies = [torch.empty_like(x, dtype=copy_dtype) for x in targets]
        copies[0] = None
        alone = clones(targets)
        with _backend.override(backend):
            ema_update_(targets, sources, decay, copies)
            ema_update_(alone, sources, decay)
        assert_equal(targets, alone)
        for copy, target in zip(copies[1:], targets[1:], strict=True):
            expected = target.to(copy_dtype)
            if interpreted(backend):
                torch.testing.assert_close(copy, expected, rtol=2 * torch.finfo(copy_dtype).eps, atol=0)
            else:
                assert torch.equal(copy, expected)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("kind", ["number", "host", "device"])
def test_decay_ends_do_not_read_the_other_side(backend, device, kind):
    """decay 0 copies the source over an uninitialised target; decay 1 leaves every bit whatever the source holds."""
    make = {"number": float, "host": torch.tensor, "device": lambda d: torch.tensor([d], device=device)}[kind]
    for dtype in ALL_DTYPES:
        targets, sources = pairs((5, 1030), dtype, dtype, device)
        sources[0][1] = -0.0
        poisoned, kept = [torch.full_like(x, NAN) for x in targets], clones(targets)
        with _backend.override(backend):
            ema_update_(poisoned, sources, make(0.0))
            ema_update_(targets, [torch.full_like(x, NAN) for x in sources], make(1.0))
        assert_equal(targets, kept)
        assert_equal(poisoned, sources)
        assert torch.signbit(poisoned[0][1])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_decay_tensor_equals_number(backend, device):
    targets, sources = pairs((3, 1030), device=device)
    wide = targets[1].double()
    results = []
    for decay in (
        0.99,
        torch.tensor(0.99, dtype=torch.float64),
        torch.tensor([0.99], dtype=torch.float64, device=device),
    ):
        results.append([*clones(targets), wide.clone()])
        with _backend.override(backend):
            ema_update_(results[-1], [*sources, sources[1]], decay)
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_nan_stays_where_it_is(backend, device):
    targets, sources = pairs((1030, 50), torch.bfloat16, torch.bfloat16, device)
    targets[0][7], sources[0][1029] = NAN, NAN
    with _backend.override(backend):
        ema_update_(targets, sources, 0.5)
    assert torch.isnan(targets[0]).nonzero().flatten().tolist() == [7, 1029]
    assert torch.isfinite(targets[1]).all()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_many_tensors(backend, device):
    """2,000 tensors in one call: as one by one, and the same bits twice."""
    sizes = [(i * 37) % 90 for i in range(2000)]
    targets, sources = pairs(sizes, device=device)
    for i in range(0, 2000, 3):
        sources[i] = sources[i].bfloat16()
    again, alone = clones(targets), clones(targets)
    with _backend.override(backend):
        ema_update_(targets, sources, 0.9)
        ema_update_(again, sources, 0.9)
        for i in range(0, 2000, 97):
            ema_update_(alone[i : i + 1], sources[i : i + 1], 0.9)
    assert_equal(targets, again)
    assert_equal(targets[::97], alone[::97])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_tensors_of_several_chunks(backend, device):
    """Two chunks and a part of one, between small tensors: each element from its own source."""
    targets = [torch.randn(count, device=device) for count in (3, 40_001, 5)]
    sources = [torch.randn_like(x) for x in targets]
    expected = [kernel.ema_update_ref(x, y, 0.25) for x, y in zip(targets, sources, strict=True)]
    with _backend.override(backend):
        ema_update_(targets, sources, 0.25)
    for x, wanted in zip(targets, expected, strict=True):
        torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_misaligned_views(backend, device, dtype):
    """Slices at every offset of a vector: right inside, untouched outside, the bits of an aligned tensor."""
    size, gap = 333, 19
    base = torch.randn(20 * (size + gap), device=device).to(dtype)
    source_base = torch.randn(20 * (size + gap), device=device).bfloat16()
    before = base.clone()
    starts = [i * (size + gap) + i for i in range(17)]
    aligned = [base[s : s + size].clone() for s in starts]
    sources = [source_base[s + 3 : s + 3 + size] for s in starts]
    with _backend.override(backend):
        ema_update_([base[s : s + size] for s in starts], sources, 0.25)
        ema_update_(aligned, clones(sources), 0.25)
    for start, expected in zip(starts, aligned, strict=True):
        assert torch.equal(base[start : start + size], expected)
        before[start : start + size] = expected
    assert torch.equal(base, before)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_pieces_strides_and_shapes(backend, device):
    """A tensor in pieces, a strided source and other shapes give the bits of one flat tensor."""
    targets, sources = pairs((6000,), device=device)
    pieces, image = targets[0].clone(), targets[0].clone().view(3, 5, 400)
    cuts = (0, 1, 18, 1024, 4099, 6000)
    with _backend.override(backend):
        ema_update_(targets, sources, 0.9)
        ema_update_(
            [pieces[a:b] for a, b in itertools.pairwise(cuts)],
            [sources[0][a:b] for a, b in itertools.pairwise(cuts)],
            0.9,
        )
        ema_update_([image], [strided(sources[0].view(3, 5, 400))], 0.9)
    assert torch.equal(pieces, targets[0])
    assert torch.equal(image.flatten(), targets[0])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck_and_compile(backend, device):
    targets, sources = pairs((65, 7), device=device)
    sources[1] = sources[1].bfloat16()
    copies = [torch.zeros_like(targets[0], dtype=torch.bfloat16)]
    with _backend.override(backend):
        operation = torch.ops.twinflow.ema_update_
        torch.library.opcheck(operation, (targets, sources, 0.9, None, copies))
        torch.library.opcheck(operation, (targets, sources, 0.0, torch.tensor(0.9, device=device), []))

        def step(targets, sources, decay, copies):
            ema_update_(targets, sources, decay, [*copies, None])
            return targets[0] + copies[0]

        for decay in (0.9, torch.tensor(0.9, device=device)):
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
            eager = clones(targets), sources, decay, clones(copies)
            traced = clones(targets), sources, decay, clones(copies)
            assert torch.equal(compiled(*traced), step(*eager))
            assert_equal([*traced[0], *traced[3]], [*eager[0], *eager[3]])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_two_updates_are_one_of_the_squared_decay(backend, device):
    """Property, same source: d (d t + (1 - d) s) + (1 - d) s = d^2 t + (1 - d^2) s."""
    targets, sources = pairs((1000,), torch.float64, torch.float64, device)
    twice, once = clones(targets), targets
    with _backend.override(backend):
        for _ in range(2):
            ema_update_(twice, sources, 0.9)
        ema_update_(once, sources, 0.9**2)
    torch.testing.assert_close(twice, once, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_bf16_targets_stall_and_float32_targets_move(backend, device):
    """Property: at decay 0.99 an increment of 0.001 is below bf16's rounding at 1, so only a float32 shadow follows."""
    narrow, wide = torch.ones(4, dtype=torch.bfloat16, device=device), torch.ones(4, device=device)
    sources = [torch.full((4,), 1.1, device=device)] * 2
    with _backend.override(backend):
        for _ in range(300):
            ema_update_([narrow, wide], sources, 0.99)
    assert torch.equal(narrow, torch.ones_like(narrow))
    expected = 1.1 - 0.1 * 0.99**300
    torch.testing.assert_close(wide, torch.full_like(wide, expected), rtol=1e-5, atol=0)


def test_same_bits_for_any_threads_and_instruction_set():
    native = _backend.native()
    if native is None or _backend.interpreting():
        pytest.skip("no C++ backend in this process")
    sizes = (70_001, 1, 0, 600_003, 0, 517)
    targets, sources = pairs(sizes)
    sources[1], sources[3], targets[5] = sources[1].half(), sources[3].bfloat16(), targets[5].bfloat16()
    expected = [kernel.ema_update_ref(t, s, 0.9) for t, s in zip(targets, sources, strict=True)]
    isas = ["baseline", "avx2", "avx512"]
    isas = isas[: isas.index(native.detected_isa()) + 1]
    threads = torch.get_num_threads()
    try:
        for isa, count in itertools.product(isas, (1, 2, 3)):
            native.set_isa(isa)
            torch.set_num_threads(count)
            result = clones(targets)
            ema_update_(result, sources, 0.9)
            assert_equal(result, expected)
    finally:
        native.set_isa(native.detected_isa())
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_backward_pass_notices_the_update(backend, device):
    """As after torch's own in-place operations: the saved target is no longer the one of the forward pass."""
    targets, sources = pairs((5,), device=device)
    x = torch.ones(5, device=device, requires_grad=True)
    out = (x * targets[0]).sum()
    with _backend.override(backend):
        ema_update_(targets, sources, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_launch_config_covers_every_tensor():
    for count, aligned in itertools.product((1, 127, 128, 5000, 16384, 1 << 22), (True, False)):
        chunk, block, num_warps = kernel.launch_config(count, aligned)
        assert chunk % block == 0 and 128 <= block <= chunk <= 16384 and num_warps == 8


def test_chunk_tables():
    """Chunks of 16,384 elements: none for an empty tensor, as many as needed for the others, in order."""
    table = np.zeros(3, kernel.PAIR)
    table["count"] = (16385, 0, 7)
    rows, of_chunk = kernel._chunk_tables(table.tobytes(), 16384, torch.device("cpu"))
    assert of_chunk.tolist() == [0, 0, 2]
    assert rows[:, 3].tolist() == [16385, 0, 7] and rows[:, 4].tolist() == [0, 2, 2]
