"""The sampler: the published grids, exact on straight paths, a restatement step by step, really of second order."""

import math
from itertools import pairwise

import pytest
import torch

from twinflow.sampling import sample
from twinflow.sampling.grid import default_gap_end, sampling_grid
from twinflow.sampling.sampler import SamplerConfig

GAPLESS = dict(gap_start=0.0, gap_end=0.0)


def straight(x_data):
    """The velocity of a straight path to fixed data: F = (x_t - x) / t for every target time."""

    def student(x_t, t, r, cond):
        return (x_t - x_data) / t.view(-1, 1)

    return student


def bent(x_t, t, r, cond):
    """A velocity that depends on everything it may depend on."""
    return torch.sin(3 * x_t) + t.view(-1, 1) * x_t - 0.5 * r.view(-1, 1)


def restated(z, times, style, rho, extrapolation, order, noises):
    """Equations 33 and 35 to 37, one row of text each, for the network `bent`."""

    def ask(x, t, r):
        return torch.sin(3 * x) + t * x - 0.5 * r

    x, hats = z, []
    for s, end in pairwise(times):
        velocity = ask(x, s, {"few": 0.0, "any": end, "mul": s}[style])
        if order == 2 and end > 0:
            second = ask(x - (s - end) * velocity, end, 0.0 if style == "few" else end)
            velocity = (velocity + second) / 2
        x_hat, z_hat = x - s * velocity, x + (1 - s) * velocity
        hats.append((x_hat, z_hat))
        if len(hats) >= 3:
            x_hat = x_hat + extrapolation * (x_hat - hats[-2][0])
            z_hat = z_hat + extrapolation * (z_hat - hats[-2][1])
        share = (min(1.0, 2 * s * (s - end) / end**2) if end else 0.0) if rho == "SDE" else rho
        noise = next(noises) if end and share > 0 else torch.zeros_like(z)
        x = (1 - end) * x_hat + end * (math.sqrt(1 - share) * z_hat + math.sqrt(share) * noise)
    return x


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("style", ["few", "any", "mul"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0, "SDE"])
def test_straight_paths_arrive(style, steps, rho, order):
    """From z at the first time, a straight path's data are reached whatever is noised again on the way."""
    torch.manual_seed(0)
    x, z = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    options = dict(style=style, stochasticity=rho, order=order, extrapolation=0.3, shift=1.5)
    out = sample(straight(x), z, steps=steps, **options)
    # The first query treats z as x_t at its time, so its prediction is exact there.
    torch.testing.assert_close(out, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("style", ["few", "any", "mul"])
@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0, "SDE"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("extrapolation", [0.0, 0.4])
def test_restatement(style, rho, order, extrapolation):
    z = torch.randn(3, 4, dtype=torch.float64)
    options = dict(style=style, stochasticity=rho, order=order, extrapolation=extrapolation)
    out = sample(bent, z, steps=5, generator=torch.Generator().manual_seed(4), **options)
    source = torch.Generator().manual_seed(4)
    noises = iter([torch.randn(z.shape, dtype=z.dtype, generator=source) for _ in range(4)])
    times = sampling_grid(5, 0.001, default_gap_end(5, style))
    torch.testing.assert_close(
        out, restated(z, times, style, rho, extrapolation, order, noises), rtol=1e-12, atol=1e-12
    )
    # Every option moves the result: the reference is not met by ignoring it.
    others = [dict(order=3 - order), dict(stochasticity=0.25), dict(extrapolation=0.1)]
    for other in others:
        again = sample(bent, z, steps=5, generator=torch.Generator().manual_seed(4), **options | other)
        assert not torch.allclose(again, out)


def growth_error(steps, order):
    """Error of dx/dt = x (1 + t) from t = 1 to 0, whose end is z exp(-3/2)."""

    def student(x_t, t, r, cond):
        return x_t * (1 + t.view(-1, 1))

    z = torch.ones(1, 1, dtype=torch.float64)
    return abs(sample(student, z, steps=steps, style="mul", order=order, **GAPLESS).item() - math.exp(-1.5))


@pytest.mark.parametrize("order, factor", [(1, 2.0), (2, 4.0)])
def test_order_is_the_order(order, factor):
    """Twice the steps divide the error by 2 to the order."""
    errors = [growth_error(steps, order) for steps in (20, 40, 80)]
    for before, after in pairwise(errors):
        assert before / after == pytest.approx(factor, rel=0.1)


def test_second_order_from_pure_noise_is_finite():
    """The published form divides by 1 - t; the first query here is at t = 1."""
    for steps in (2, 4):
        out = sample(bent, torch.randn(2, 3), steps=steps, order=2, gap_start=0.0, stochasticity=0.0)
        assert out.isfinite().all()


@pytest.mark.parametrize("order, within", [(1, 0.07), (2, 0.01)])
def test_the_published_multi_step_sampler(order, within):
    """30 steps `mul` follow the flow of dx/dt = x (1 + t); with the end gap of few steps they miss by more."""

    def student(x_t, t, r, cond):
        return x_t * (1 + r.view(-1, 1))

    z = torch.ones(1, 1, dtype=torch.float64)
    options = dict(steps=30, style="mul", stochasticity=0.0, time_dist_ctrl=(1.17, 0.8, 1.1), order=order)
    assert sample(student, z, **options).item() == pytest.approx(math.exp(-1.5), rel=within)
    assert sample(student, z, gap_end=0.3, **options).item() != pytest.approx(math.exp(-1.5), rel=within)


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
        asked.clear()
        sample(student, z, "c", steps=2, style=style, order=2)
        middle = 0.0 if style == "few" else 0.6
        assert asked == pytest.approx([0.999, targets[0], 0.6, middle, 0.6, targets[1]], abs=1e-6)


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


def test_a_generator_per_row_makes_rows_independent_of_their_batch():
    def student(x_t, t, r, cond):
        return torch.tanh(x_t)

    z = torch.randn(3, 5)
    seeded = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    together = sample(student, z, steps=4, generator=seeded)
    alone = [sample(student, z[i : i + 1], steps=4, generator=torch.Generator().manual_seed(7 + i)) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("steps, times", [(1, [0.999]), (2, [0.999, 0.6]), (4, [0.999, 0.8327, 0.6663, 0.5])])
def test_published_grids(steps, times):
    for style in ("few", "any", "mul"):
        assert SamplerConfig(style=style).times(steps) == sampling_grid(steps)
    assert sampling_grid(steps) == pytest.approx([*times, 0.0], abs=1e-4)


def test_many_steps_end_near_the_data():
    assert SamplerConfig().times(8)[-2] == SamplerConfig(style="any").times(8)[-2] == pytest.approx(0.3)
    assert SamplerConfig(style="mul").times(8) == sampling_grid(8, 0.001, 0.0)
    assert SamplerConfig(style="mul", gap_end=0.3).times(8) == sampling_grid(8)


def test_grid_warp_and_zero_gap():
    assert sampling_grid(4, 0.0, 0.0) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    warped = sampling_grid(30, 0.001, 0.0, (1.17, 0.8, 1.1))
    assert len(warped) == 31 and warped == sorted(warped, reverse=True) and warped[-1] == 0.0


def test_shift_moves_the_grid_towards_noise():
    times = SamplerConfig(shift=3.0, **GAPLESS).times(4)
    assert times == pytest.approx([1.0, 3 * 0.75 / 2.5, 3 * 0.5 / 2.0, 3 * 0.25 / 1.5, 0.0])


def test_the_sde_ratio_is_computed_at_each_step():
    config = SamplerConfig(stochasticity="SDE")
    assert config.ratio(0.8, 0.7) == pytest.approx(2 * 0.8 * 0.1 / 0.49)
    assert config.ratio(0.5, 0.45) == pytest.approx(2 * 0.5 * 0.05 / 0.2025)
    assert config.ratio(0.999, 0.6) == 1.0 and config.ratio(0.5, 0.0) == 0.0


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(steps=0), ValueError, "steps must be an integer >= 1, got 0"),
        (dict(steps=1.5), ValueError, "steps must be an integer >= 1, got 1.5"),
        (dict(style="slow"), ValueError, "sample: style must be one of few, any, mul, got 'slow'"),
        (dict(stochasticity=1.5), ValueError, r"stochasticity must be in \[0, 1\], got 1.5"),
        (dict(stochasticity=float("nan")), ValueError, "stochasticity"),
        (dict(stochasticity="all"), ValueError, r"stochasticity must be in \[0, 1\], got 'all'"),
        (dict(steps="two"), ValueError, "steps must be an integer >= 1, got 'two'"),
        (dict(gap_end=1.0), ValueError, "sample: gap_end must be in"),
        (dict(gap_start=1.0), ValueError, "sample: gap_start must be in"),
        (dict(gap_start="0"), ValueError, "sample: gap_start must be in"),
        (dict(time_dist_ctrl=(1.0, 1.0)), ValueError, "sample: time_dist_ctrl must be three numbers > 0"),
        (dict(shift=0.0), ValueError, "sample: shift must be a number > 0, got 0.0"),
        (dict(extrapolation=-0.1), ValueError, "sample: extrapolation must be a number >= 0, got -0.1"),
        (dict(order=3), ValueError, "sample: order must be 1 or 2, got 3"),
        (dict(order=True), ValueError, "sample: order must be 1 or 2, got True"),
        (dict(order=2.0), ValueError, "sample: order must be 1 or 2, got 2.0"),
        (dict(shift=float("nan")), ValueError, "sample: shift must be a number > 0, got nan"),
        (dict(shift="3"), ValueError, "sample: shift must be a number > 0, got '3'"),
        (dict(time_dist_ctrl=(1.0, 0.0, 1.0)), ValueError, "sample: time_dist_ctrl must be three numbers > 0"),
        (dict(steps=3, gap_start=0.5, gap_end=0.5), ValueError, "sampling_grid: 3 times must fall"),
        (dict(steps=3, time_dist_ctrl=(60.0, 1.0, 1.0)), ValueError, "sampling_grid: 3 times must fall"),
        (dict(generator=[torch.Generator()]), ValueError, "generator must be one or a list of 2, got 1"),
        (dict(generator=7), TypeError, "generator must be a torch.Generator or a list, got int"),
        (dict(gap=0.1), TypeError, "unexpected keyword argument 'gap'"),
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
