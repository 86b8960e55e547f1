"""The sampler: the published grids, exact on straight paths, reproducible, never touching its input."""

import pytest
import torch

from twinflow.grid import sampling_grid
from twinflow.sampling import sample


def straight(x_data):
    """The velocity of a straight path to fixed data: F = (x_t - x) / t for every target time."""

    def student(x_t, t, r, cond):
        return (x_t - x_data) / t.view(-1, 1)

    return student


@pytest.mark.parametrize("style", ["few", "any", "mul"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
def test_straight_paths_arrive(style, steps, rho):
    """From z at the first time, a straight path's data are reached whatever is noised again on the way."""
    torch.manual_seed(0)
    x, z = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    out = sample(straight(x), z, steps=steps, style=style, stochasticity=rho)
    # The first query treats z as x_t at t = 0.999, so its prediction is exact there.
    torch.testing.assert_close(out, x, rtol=1e-9, atol=1e-9)


def test_queries_follow_grid_and_style():
    asked = []

    def student(x_t, t, r, cond):
        assert t.dtype == r.dtype == torch.float32 and x_t.dtype == torch.bfloat16 and cond == "c"
        asked.extend([t[0].item(), r[0].item()])
        return torch.zeros_like(x_t)

    z = torch.randn(2, 3, dtype=torch.bfloat16)
    before = z.clone()
    for style, targets in {"few": [0, 0], "any": [0.6, 0], "mul": [0.999, 0.6]}.items():
        asked.clear()
        out = sample(student, z, "c", steps=2, style=style)
        assert asked == pytest.approx([0.999, targets[0], 0.6, targets[1]], abs=1e-6)
        assert out.dtype == z.dtype and torch.equal(z, before)


def test_noise_comes_from_the_generator():
    def student(x_t, t, r, cond):
        return 0.5 * x_t

    z = torch.randn(4, 6)
    torch.manual_seed(1)
    first = sample(student, z, steps=4, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    assert torch.equal(first, sample(student, z, steps=4, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, sample(student, z, steps=4, generator=torch.Generator().manual_seed(4)))
    deterministic = sample(student, z, steps=4, style="any")
    assert torch.equal(deterministic, sample(student, z, steps=4, style="any"))


@pytest.mark.parametrize("steps, times", [(1, [0.999]), (2, [0.999, 0.6]), (4, [0.999, 0.8327, 0.6663, 0.5])])
def test_published_grids(steps, times):
    assert sampling_grid(steps) == pytest.approx([*times, 0.0], abs=1e-4)


def test_grid_warp_and_zero_gap():
    assert sampling_grid(4, 0.0, 0.0) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    warped = sampling_grid(30, 0.001, 0.0, (1.17, 0.8, 1.1))
    assert len(warped) == 31 and warped == sorted(warped, reverse=True) and warped[-1] == 0.0


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(steps=0), ValueError, "steps must be an integer >= 1, got 0"),
        (dict(steps=1.5), ValueError, "steps must be an integer >= 1, got 1.5"),
        (dict(style="slow"), ValueError, "style must be one of few, any, mul, got 'slow'"),
        (dict(stochasticity=1.5), ValueError, r"stochasticity must be in \[0, 1\], got 1.5"),
        (dict(stochasticity=float("nan")), ValueError, "stochasticity"),
        (dict(stochasticity="all"), ValueError, r"stochasticity must be in \[0, 1\], got 'all'"),
        (dict(steps="two"), ValueError, "steps must be an integer >= 1, got 'two'"),
        (dict(gap_end=1.0), ValueError, "gap_end must be in"),
        (dict(z=torch.ones(2, 3, dtype=torch.int64)), TypeError, "z must be a floating tensor, got torch.int64"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(z=torch.ones(2, 3)) | change
    with pytest.raises(error, match=message):
        sample(lambda x_t, t, r, cond: x_t, arguments.pop("z"), **arguments)


def test_a_velocity_of_another_shape():
    with pytest.raises(ValueError, match=r"sample: student must return \(2, 3\), got \(2, 1\)"):
        sample(lambda x_t, t, r, cond: x_t[:, :1], torch.ones(2, 3))
