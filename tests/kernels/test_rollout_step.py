"""`rollout_step_`: every backend against the reference in float64, contracts, errors."""

import pytest
import torch
from helpers.kernel_checks import DTYPES, ROW_SIZES, assert_accurate, backends, strided

from twinflow_kernels import _backend, rollout_step_
from twinflow_kernels import rollout_step as kernel

BACKENDS = backends(kernel._operation)


def inputs(row_size=64, rows=3, x_dtype=torch.float32, v_dtype=torch.float32, device="cpu"):
    x = torch.randn(rows, row_size, dtype=x_dtype, device=device)
    v = torch.randn(rows, row_size, device=device).to(v_dtype)
    return x, v, torch.rand(rows, dtype=x_dtype, device=device)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("v_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row_size", ROW_SIZES)
def test_accuracy(backend, device, row_size, x_dtype, v_dtype):
    x, v, dt = inputs(row_size, 3, x_dtype, v_dtype, device)
    exact = kernel.rollout_step_ref(x.double(), v.double(), dt.double())
    reference = kernel.rollout_step_ref(x, v, dt)
    with _backend.override(backend):
        result = rollout_step_(x, v, dt)
    assert result is x
    assert_accurate(x, exact, reference, backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (1, 40_001), (2, 4, 8, 8), (5,)])
def test_shapes_and_bits(backend, device, shape):
    """Empty, single-row, image-shaped and many-chunk inputs; the same bits twice."""
    x, v = torch.randn(shape, device=device), torch.randn(shape, device=device)
    dt = torch.rand(shape[0], device=device)
    exact, reference = kernel.rollout_step_ref(x.double(), v, dt), kernel.rollout_step_ref(x, v, dt)
    again = x.clone()
    with _backend.override(backend):
        rollout_step_(x, v, dt)
        rollout_step_(again, v, dt)
    assert torch.equal(x, again)
    assert_accurate(x, exact, reference, backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_strided_velocity_and_rows_are_independent(backend, device):
    x, v, dt = inputs(130, 4, device=device)
    alone = [x[i : i + 1].clone() for i in range(4)]
    with _backend.override(backend):
        rollout_step_(x, strided(v), dt)
        for i, row in enumerate(alone):
            rollout_step_(row, v[i : i + 1], dt[i : i + 1])
    assert torch.equal(x, torch.cat(alone))


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_steps_of_any_dtype_and_stride(backend, device, dtype):
    x, v, _ = inputs(130, 4, device=device)
    dt = torch.tensor([[0.5, 0.25]], dtype=dtype, device=device).expand(4, 2)[:, 1]
    expected = kernel.rollout_step_ref(x, v, dt)
    with _backend.override(backend):
        rollout_step_(x, v, dt)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck_and_compile(backend, device):
    with _backend.override(backend):
        torch.library.opcheck(torch.ops.twinflow.rollout_step_, inputs(65, device=device))
        x, v, dt = inputs(65, device=device)
        expected = rollout_step_(x.clone(), v, dt)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(x, v, dt):
            return rollout_step_(x.clone(), v, dt)

        assert torch.equal(step(x, v, dt), expected)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_steps_there_and_back(backend, device):
    """Property: a step and its reverse restore the state to rounding; dt = 0 keeps every bit."""
    x, v, dt = inputs(1000, device=device)
    before = x.clone()
    with _backend.override(backend):
        rollout_step_(x, v, torch.zeros_like(dt))
        assert torch.equal(x, before)
        rollout_step_(x, v, dt)
        rollout_step_(x, v, -dt)
    torch.testing.assert_close(x, before, rtol=1e-5, atol=1e-6)


def test_launch_config_covers_the_row():
    for row_size in (1, 127, 128, 5000, 1 << 20):
        block, num_warps = kernel.launch_config(row_size)
        assert block & (block - 1) == 0 and 128 <= block <= 2048 and num_warps in (4, 8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.ones(3, 4, dtype=torch.bfloat16)), TypeError, "x must be float32, float64, got bfloat16"),
        (dict(x=torch.ones(3, 4, dtype=torch.int64)), TypeError, "x must be float32"),
        (dict(v=torch.ones(3, 4, dtype=torch.complex64)), TypeError, "v_pred must be"),
        (dict(v=[1.0]), TypeError, "v_pred must be a tensor, got list"),
        (dict(v=torch.ones(3, 5)), ValueError, r"v_pred must be of x's shape \(3, 4\), got \(3, 5\)"),
        (dict(dt=torch.ones(4)), ValueError, r"dt must be of shape \(3,\), got \(4,\)"),
        (dict(x=torch.ones(4, 3).T), ValueError, "x must be contiguous"),
        (dict(x=torch.ones(3, 4, requires_grad=True)), ValueError, "x must be a tensor without requires_grad"),
        (dict(x=torch.tensor(1.0)), ValueError, r"x must be of shape \(B, ...\)"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(x=torch.ones(3, 4), v=torch.ones(3, 4), dt=torch.ones(3)) | change
    before = arguments["x"].detach().clone()
    with pytest.raises(error, match=message):
        rollout_step_(arguments["x"], arguments["v"], arguments["dt"])
    assert torch.equal(arguments["x"], before)


def test_overlap_is_refused():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="v_pred must be memory of its own"):
        rollout_step_(x, x, torch.ones(3))
