"""`rollout_start`: every backend against the reference in float64, contracts, errors."""

import importlib

import pytest
import torch
from helpers.kernel_checks import DTYPES, ROW_SIZES, assert_accurate, backends, strided

from twinflow_kernels import _backend, rollout_start

kernel = importlib.import_module("twinflow_kernels.rollout_start")  # the package's attribute is the function
BACKENDS = backends(kernel._operation)
NAMES = ("v_target", "x_t", "v_cond", "v_uncond", "ratio", "delta")


def inputs(shape=(3, 64), dtypes=(torch.float32,) * 4, device="cpu", cfg=True):
    v_target, x_t, v_cond, v_uncond = (torch.randn(shape, device=device).to(d) for d in dtypes)
    ratio, delta = torch.rand(shape[0], device=device), 0.01 * torch.rand(shape[0], device=device)
    ratio[1::2] = 0
    return v_target, x_t, v_cond if cfg else None, v_uncond if cfg else None, ratio, delta


def doubled(arguments):
    return tuple(None if value is None else value.double() for value in arguments)


def check(arguments, backend):
    with _backend.override(backend):
        result, again = rollout_start(*arguments), rollout_start(*arguments)
    for actual, twice, exact, reference in zip(
        result, again, kernel.rollout_start_ref(*doubled(arguments)), kernel.rollout_start_ref(*arguments), strict=True
    ):
        assert actual.is_contiguous()
        assert torch.equal(actual, twice)
        assert_accurate(actual, exact, reference, backend)
    return result


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("teacher", [*DTYPES, torch.float64])
@pytest.mark.parametrize("state", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("row_size", ROW_SIZES)
def test_accuracy(backend, device, row_size, state, teacher, cfg):
    check(inputs((3, row_size), (state, torch.float32, teacher, teacher), device, cfg), backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (1, 20_001), (2, 4, 8, 8), (5,)])
def test_shapes(backend, device, shape):
    check(inputs(shape, device=device), backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("v_target, x_t, result", [
    (torch.bfloat16, torch.float16, torch.float32),
    (torch.float16, torch.float64, torch.float64),
    (torch.float64, torch.float32, torch.float64),
])  # fmt: skip
def test_result_dtype(backend, device, v_target, x_t, result):
    v_star, x_m = check(inputs((2, 33), (v_target, x_t, torch.float16, torch.bfloat16), device), backend)
    assert v_star.dtype == x_m.dtype == result


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_rows_that_are_not_enhanced_read_no_teacher(backend, device):
    """NaN where ratio is 0 does not matter and v* keeps every bit of v_target; elsewhere NaN comes through."""
    v_target, x_t, v_cond, v_uncond, ratio, delta = inputs((4, 130), device=device)
    v_target[1, 0] = -0.0
    v_cond[1::2], v_uncond[3] = float("nan"), float("inf")
    v_uncond[2, 7] = float("nan")
    with _backend.override(backend):
        v_star, x_m = rollout_start(v_target, x_t, v_cond, v_uncond, ratio, delta)
    assert torch.equal(v_star[1::2].view(torch.int32), v_target[1::2].view(torch.int32))
    for result in (v_star, x_m):
        assert result.isnan().nonzero().tolist() == [[2, 7]]


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_strided_inputs_and_rows_are_independent(backend, device):
    arguments = inputs((4, 130), device=device)
    with _backend.override(backend):
        whole = rollout_start(*(strided(a) if a.dim() > 1 else a for a in arguments))
        rows = [rollout_start(*(a[i : i + 1] for a in arguments)) for i in range(4)]
    for i, result in enumerate(whole):
        assert torch.equal(result, torch.cat([row[i] for row in rows]))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_coefficients_of_any_dtype_and_stride(backend, device, dtype):
    v_target, x_t, v_cond, v_uncond, _, _ = inputs((4, 130), device=device)
    coefficients = torch.tensor([[0.5, 0.25]], dtype=dtype, device=device).expand(4, 2)
    check((v_target, x_t, v_cond, v_uncond, coefficients[:, 0], coefficients[:, 1]), backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("cfg", [True, False])
def test_opcheck_and_compile(backend, device, cfg):
    arguments = inputs((3, 65), (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16), device, cfg)
    with _backend.override(backend):
        torch.library.opcheck(torch.ops.twinflow.rollout_start, arguments)
        compiled = torch.compile(rollout_start, fullgraph=True, backend="aot_eager")
        for actual, expected in zip(compiled(*arguments), rollout_start(*arguments), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_straight_flow(backend, device):
    """Property: along a straight flow the step ends on the path, x_m = (t - delta) z + (1 - t + delta) x."""
    x, z = torch.randn(2, 4, 100, device=device).unbind()
    t, delta = torch.rand(4, 1, device=device), torch.full((4,), 0.01, device=device)
    teacher = torch.randn(4, 100, device=device)  # cond and uncond agree: guidance changes nothing
    with _backend.override(backend):
        v_star, x_m = rollout_start(z - x, t * z + (1 - t) * x, teacher, teacher, torch.ones_like(delta), delta)
    assert torch.equal(v_star, z - x)
    torch.testing.assert_close(x_m, (t - 0.01) * z + (1.01 - t) * x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_results_are_memory_of_their_own(backend, device):
    arguments = inputs((2, 8), device=device, cfg=False)
    before = arguments[0].clone()
    with _backend.override(backend):
        v_star, _ = rollout_start(*arguments)
    v_star.zero_()
    assert torch.equal(arguments[0], before)


@pytest.mark.parametrize("rows, row_size", [(3, 4096 * 3 + 5), (70_000, 1)])
def test_chunks_and_threads(rows, row_size):
    """Rows of several chunks, and more rows than chunks: the bits of the reference, which rounds in the same places."""
    arguments = inputs((rows, row_size))
    with _backend.override("cpu"):
        result = rollout_start(*arguments)
    for actual, wanted in zip(result, kernel.rollout_start_ref(*arguments), strict=True):
        assert torch.equal(actual, wanted)


def test_launch_config_covers_the_row():
    for row_size in (1, 127, 128, 5000, 1 << 20):
        block, num_warps = kernel.launch_config(row_size)
        assert block & (block - 1) == 0 and 128 <= block <= 1024 and num_warps == 4


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"v_target": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "v_target must be float32"),
        ({"x_t": [1.0]}, TypeError, "x_t must be a tensor, got list"),
        ({"v_cond": None}, ValueError, "v_cond and v_uncond must be both given or both None, got one of them"),
        ({"v_uncond": torch.ones(3, 5)}, ValueError, r"v_uncond must be of x_t's shape \(3, 4\), got \(3, 5\)"),
        ({"ratio": torch.ones(4)}, ValueError, r"ratio must be of shape \(3,\), got \(4,\)"),
        ({"delta": torch.ones(3, dtype=torch.int32)}, TypeError, "delta must be float32"),
        ({"v_target": torch.ones(3, 4, device="meta")}, ValueError, "v_target must be on x_t's device cpu, got meta"),
        ({"v_cond": torch.ones(3, 4, requires_grad=True)}, ValueError, "v_cond must be .*, as targets are constants"),
        ({"ratio": torch.ones(3, requires_grad=True)}, ValueError, "ratio must be a tensor without requires_grad"),
        ({"x_t": torch.tensor(1.0)}, ValueError, r"x_t must be of shape \(B, ...\)"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(zip(NAMES, inputs((3, 4)), strict=True)) | change
    with pytest.raises(error, match=message):
        rollout_start(*arguments.values())


def test_constants_may_require_grad_under_no_grad():
    arguments = [a.requires_grad_() for a in inputs()]
    with torch.no_grad():
        assert not any(result.requires_grad for result in rollout_start(*arguments))
