"""`velocity_loss`: every backend against the reference in float64, contracts, errors."""

import math

import pytest
import torch
from helpers.kernel_checks import DTYPES, ROW_SIZES, strided
from helpers.velocity_loss_cases import BACKENDS, INF, both, check, inputs

from twinflow_kernels import _backend, velocity_loss


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("row_size", [*ROW_SIZES, 4096, 8192, 20_000])
def test_row_sizes(backend, device, row_size):
    check(inputs((6, row_size), device=device), backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("state", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("v_dtype", [*DTYPES, torch.float64])
def test_dtypes(backend, device, v_dtype, state):
    losses, _ = check(inputs((6, 129), (v_dtype, state, torch.float32, torch.float32), device), backend)
    assert losses.dtype == (torch.float64 if torch.float64 in (v_dtype, state) else torch.float32)
    check(inputs((6, 129), (torch.float32, torch.float16, state, v_dtype), device), backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("options", [{"loss": "l2"}, *({"alpha": a, "c": c} for a in (2, 1, 0.0, -2, 2.5, 2 + 1e-6)
                                                      for c in (1e-3, 0.3))])  # fmt: skip
@pytest.mark.parametrize("target, path", [(True, True), (False, True), (True, False), (False, False)])
def test_losses(backend, device, options, target, path):
    arguments = inputs((7, 300), device=device, target=target, path=path)
    check(arguments, backend, grad_loss=torch.rand(7, device=device), **options)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (5,), (2, 3, 4, 5), (1, 40_001), (40, 3)])
def test_shapes(backend, device, shape):
    check(inputs(shape, device=device), backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_no_rows(backend, device):
    losses, dv = check(inputs((0, 5), device=device), backend)
    assert losses.shape == (0,) and dv.shape == (0, 5)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16])
def test_what_a_row_does_not_read_may_be_nan(backend, device, v_dtype):
    """a = 0: v_pred; b = 0: x_start and x_end; weight = 0: nothing, and loss and gradient are exactly 0."""
    rows = [[0, -1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0], [0, 0, INF, 1], [INF, INF, math.nan, 0]]
    clean = inputs((5, 130), (v_dtype, *(torch.float32,) * 3), device, rows)
    dirty = [x.detach().clone() for x in clean]
    for tensor, unread in zip(dirty, ([0, 2, 3, 4], [2, 4], [1, 2, 3, 4], [1, 2, 3, 4]), strict=False):
        tensor[unread] = math.nan
    dirty[0].requires_grad_()
    upstream = torch.tensor([1.0, 2.0, math.nan, 1.0, INF], device=device)
    with _backend.override(backend):
        results = [both(velocity_loss, arguments, upstream) for arguments in (clean, dirty)]
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
        assert not actual[[2, 4]].any()
        assert actual[[0, 1, 3]].isfinite().all() and actual[[0, 1, 3]].any()


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("value", [math.nan, INF])
def test_nan_is_never_clamped_away(backend, device, which, value):
    arguments = inputs((4, 1100), device=device, rows=[[1, 1, 0.5, 1]] * 4)
    with torch.no_grad():
        arguments[which][1, 1030] = value
    with _backend.override(backend):
        losses, dv = both(velocity_loss, arguments)
    if math.isnan(value):
        assert losses.isnan().tolist() == [False, True, False, False]
        assert dv.isnan().any(1).tolist() == [False, True, False, False]
    else:
        assert losses.isfinite().all() and dv.isfinite().all()


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("column", range(4))
def test_nan_coefficients_make_their_row_nan(backend, device, column):
    arguments = inputs((3, 9), device=device, rows=[[1, 1, 1, 1]] * 3)
    arguments[4][1, column] = math.nan
    with _backend.override(backend):
        losses, dv = both(velocity_loss, arguments)
    assert losses.isnan().tolist() == [False, True, False]
    assert dv.isnan().all(1).tolist() == dv.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("size", [1e6, 1e-3, 1e-20, 1e-39])
@pytest.mark.parametrize("options", [{"loss": "l2"}, {}, {"alpha": -2.0}])
def test_large_and_subnormal_residuals(backend, device, size, options):
    arguments = inputs((4, 1500), device=device, rows=[[1, 0, INF, 1], [1, 1, INF, 1], [1, 0, 1, 1], [2, 0, 1e5, 1]])
    check([x if i == 4 else (x.detach() * size).requires_grad_(i == 0) for i, x in enumerate(arguments)], backend,
          **options)  # fmt: skip


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("options", [{"loss": "l2"}, {}, {"alpha": 0.0}, {"alpha": -2.0}])
def test_no_residual_gives_no_loss_and_no_gradient(backend, device, options):
    v_pred, _, x_start, _, rows = inputs((3, 70), device=device, rows=[[1, 1, 1, 1], [1, 0, INF, 2], [1, 5, 1, 1]])
    with _backend.override(backend):
        losses, dv = both(velocity_loss, [v_pred, v_pred.detach(), x_start, x_start, rows], **options)
    assert not losses.any() and not dv.any()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_clamp_bounds_the_residual(backend, device):
    """Property: |R| <= clamp, so l2 losses are at most weight clamp^2, reached by large residuals of either sign."""
    arguments = inputs((3, 200), device=device, rows=[[1e4, 0, 0.5, 3], [-1e4, 0, 2, 1], [1, 0, 0, 1]])
    with _backend.override(backend):
        losses, dv = both(velocity_loss, arguments, loss="l2")
    torch.testing.assert_close(losses.cpu(), torch.tensor([0.75, 4.0, 0.0]), rtol=0.02, atol=0)
    torch.testing.assert_close(dv.abs().amax(1).cpu(), 2 * torch.tensor([1.5, 2, 0]) / 200)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_strided_inputs_and_rows_are_independent(backend, device):
    """A row's bits do not depend on the batch it is in, nor on its neighbours, nor on strides."""
    arguments = inputs((6, 5000), device=device)
    views = [x if i == 4 else strided(x.detach()).requires_grad_(i == 0) for i, x in enumerate(arguments)]
    with _backend.override(backend):
        whole, through_views = both(velocity_loss, arguments), both(velocity_loss, views)
        alone = [both(velocity_loss, [x[i : i + 1].detach().requires_grad_(j == 0) for j, x in enumerate(arguments)])
                 for i in range(6)]  # fmt: skip
    for i, result in enumerate(whole):
        assert torch.equal(result, through_views[i])
        assert torch.equal(result, torch.cat([row[i] for row in alone]))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("shape", [(6, 9000), (7, 30), (1, 300_000), (3, 140_000)])
def test_bits_do_not_depend_on_threads(threads, shape):
    if ("cpu", "cpu") not in [choice.values[:2] for choice in BACKENDS]:
        pytest.skip("no C++ backend in this process")
    arguments = inputs(shape)
    with _backend.override("cpu"):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            expected = both(velocity_loss, arguments)
            torch.set_num_threads(threads)
            actual = both(velocity_loss, arguments)
        finally:
            torch.set_num_threads(before)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 4, (torch.float64,) * 4, (torch.bfloat16, torch.float16) * 2])
@pytest.mark.parametrize("row_size", [1, 63, 4099, 8200])
def test_instruction_sets_agree_in_every_bit(instruction_set, dtypes, row_size):
    arguments = inputs((6, row_size), dtypes)
    losses, dv = check(arguments, "cpu")
    _backend.native().set_isa("baseline")
    assert all(map(torch.equal, both(velocity_loss, arguments), (losses, dv)))
