"""`time_features`: every backend against an independent float64 statement of diffusers' `Timesteps`."""

import pytest
import torch
from helpers.kernel_checks import assert_accurate, backends, sinusoids, strided

from twinflow_kernels import _backend, time_features

BACKENDS = backends(time_features._operation)
OP = torch.ops.twinflow.time_features
EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, 0.999, -1e-3, 1e-30]


def times(count=8, dtype=torch.float32, device="cpu"):
    edges = torch.tensor(EDGES, dtype=dtype, device=device)
    return torch.cat([edges, 2 * torch.rand(max(0, count - 4), dtype=dtype, device=device) - 1])[-count:]


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("flip, shift, scale", [(True, 0.0, 1000.0), (False, 1.0, 1000.0), (True, 0.5, 3.3)])
@pytest.mark.parametrize("channels", [4, 31, 256, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy(backend, device, dtype, channels, flip, shift, scale):
    """Within one unit in the last place, with angles up to 1000 rad: float32 throughout would be 1e-4 away."""
    t, r = times(8, dtype, device), times(8, dtype, device)
    with _backend.override(backend):
        features = OP(t, r, False, channels, flip, shift, scale)
    exact = torch.stack([sinusoids(s, channels, flip, shift, scale) for s in (t, r)])
    assert_accurate(
        features, exact, time_features.time_features_ref(t, r, False, channels, flip, shift, scale), backend
    )
    limit = 1.2e-7 if dtype == torch.float32 else 1e-12
    assert (features.cpu().double() - exact).abs().max() < limit


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_absolute_and_single_time(backend, device):
    t, r = times(20, device=device), times(20, device=device)
    with _backend.override(backend):
        both = OP(t, r, True, 34, True, 0.0, 1000.0)
        assert torch.equal(both, OP(t.abs(), r.abs(), False, 34, True, 0.0, 1000.0))
        assert torch.equal(both[:1], OP(t, None, True, 34, True, 0.0, 1000.0))
        assert torch.equal(both[1:], OP(r, None, True, 34, True, 0.0, 1000.0))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_strides_bits_rows_and_nan(backend, device):
    t, r = times(9, device=device), times(9, device=device)
    with _backend.override(backend):
        features = OP(t, r, False, 66, True, 0.0, 1000.0)
        assert torch.equal(features, OP(strided(t), strided(r), False, 66, True, 0.0, 1000.0))
        for row in range(9):
            alone = OP(t[row : row + 1], r[row : row + 1], False, 66, True, 0.0, 1000.0)
            assert torch.equal(features[:, row], alone[:, 0])
        t[3] = float("nan")
        poisoned = OP(t, r, False, 66, True, 0.0, 1000.0)
    assert poisoned[0, 3].isnan().all() and poisoned.isnan().sum() == 66
    poisoned[0, 3] = features[0, 3]
    assert torch.equal(poisoned, features)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_empty(backend, device):
    with _backend.override(backend):
        none = torch.empty(0, device=device)
        assert OP(none, none, False, 6, True, 0.0, 1.0).shape == (2, 0, 6)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck_and_compile(backend, device):
    arguments = (times(3, device=device), times(3, device=device), False, 33, True, 0.0, 1000.0)
    with _backend.override(backend):
        torch.library.opcheck(OP, arguments)
        compiled = torch.compile(lambda *a: OP(*a), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), OP(*arguments))


def test_launch_config_covers_the_frequencies():
    for half in (1, 31, 32, 128, 129, 4096):
        block, num_warps = time_features.launch_config(half)
        assert block & (block - 1) == 0 and 32 <= block <= 256 and num_warps in (1, 4)
