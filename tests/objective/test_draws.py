"""Draws: distributions of the roles, where the numbers come from, reproducibility."""

from itertools import pairwise

import pytest
import torch
from helpers.batches import toy_draws

from twinflow import TwinFlowConfig, TwinFlowLoss
from twinflow.objective.config import ROLES
from twinflow.objective.draws import draw_step
from twinflow.sampling.grid import sampling_grid

MANY = 4000


def times(role, generator_seed=0, **options):
    config = TwinFlowConfig(shares={role: 1, "any": 1} if role != "any" else {"any": 1}, **options)
    generator = torch.Generator().manual_seed(generator_seed)
    draws = draw_step(config, torch.zeros(MANY, 1), (role,) * MANY, generator, 0)
    return draws.t.double(), draws.r.double()


def assert_distribution(values, cdf):
    """Kolmogorov-Smirnov at a level of about 1e-6; the seed is fixed."""
    values = values.sort().values
    steps = torch.arange(1, len(values) + 1) / len(values)
    distance = (cdf(values) - steps).abs().max()
    assert distance < 2.7 / len(values) ** 0.5, f"distance {distance:.3f}"


def uniform(x):
    return x.clamp(0, 1)


def test_e2e_rows():
    t, r = times("e2e")
    assert (t == 1).all() and (r == 0).all()


def test_mul_rows_stay_within_five_percent():
    t, r = times("mul")
    assert_distribution(t, uniform)
    assert_distribution((t - r) / (0.05 * t), uniform)


def test_any_rows_are_uniform_down_to_zero():
    t, r = times("any")
    assert_distribution(t, uniform)
    assert_distribution((t - r) / t, uniform)


def test_one_rows():
    t, r = times("one")
    assert_distribution(t, uniform)
    assert (r == 0).all()


def test_adv_rows_are_negative_and_instantaneous():
    t, r = times("adv")
    assert_distribution(-t, uniform)
    assert torch.equal(t, r)


def test_all_terms_times():
    config = TwinFlowConfig(recipe="all_terms")
    draws = draw_step(config, torch.zeros(MANY, 1), None, torch.Generator().manual_seed(0), 0)
    assert_distribution(draws.t.double(), uniform)
    assert_distribution(((draws.t - draws.r) / draws.t).double(), uniform)
    assert_distribution(draws.t_rectify.double(), uniform)


@pytest.mark.parametrize("a, b, scale", [(2.0, 1.0, 1.0), (1.0, 3.0, 0.8), (0.5, 0.5, 1.0), (1.0, 1.0, 0.7)])
def test_times_follow_a_beta_distribution(a, b, scale):
    t, _ = times("any", time_dist=(a, b, scale))
    cdfs = {
        (2.0, 1.0): lambda u: u**2,
        (1.0, 3.0): lambda u: 1 - (1 - u) ** 3,
        (0.5, 0.5): lambda u: 2 / torch.pi * u.sqrt().asin(),
        (1.0, 1.0): lambda u: u,
    }
    assert_distribution(t / scale, lambda u: cdfs[a, b](u.clamp(0, 1)))


def test_noise_is_standard_normal_and_independent():
    config = TwinFlowConfig(data_free=True)
    roles = ("e2e", "mul", "any", "adv") * 500
    draws = toy_draws(config, torch.zeros(2000, 4), roles)
    noises = {"z": draws.z, "z_fake": draws.z_fake, "z_data": draws.z_data, "z_rectify": draws.z_rectify}
    for name, noise in noises.items():
        assert_distribution(noise.flatten().double(), lambda x: 0.5 * (1 + torch.erf(x / 2**0.5))), name
    adv, e2e = draws.rows_of("adv"), draws.rows_of("e2e")
    for a, b in [(draws.z[list(adv)], draws.z_fake), (draws.z, draws.z_data), (draws.z[list(e2e)], draws.z_rectify)]:
        assert abs((a * b).mean()) < 0.1


def test_shapes():
    """z_fake has the adv rows only, the rectify draws the e2e rows only (all rows for all_terms)."""
    latents = torch.zeros(7, 2, 3)
    roles = ("adv", "e2e", "any", "adv", "mul", "e2e", "adv")
    draws = toy_draws(TwinFlowConfig(data_free=True), latents, roles)
    assert draws.roles == roles and draws.z.shape == draws.z_data.shape == (7, 2, 3)
    assert draws.z_fake.shape == (3, 2, 3)
    assert draws.z_rectify.shape == (2, 2, 3) and draws.t_rectify.shape == (2,)
    draws = toy_draws(TwinFlowConfig(recipe="all_terms"), latents)
    assert draws.roles is None and draws.z_fake is None and draws.z_data is None
    assert draws.z_rectify.shape == (7, 2, 3) and draws.t_rectify.shape == (7,)
    draws = toy_draws(TwinFlowConfig(rectify_weight=0.0), latents, ("mul",) * 7)
    assert draws.z_fake is None and draws.z_rectify is None and draws.t_rectify is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_times_and_noises_are_float32_or_wider(dtype):
    draws = toy_draws(TwinFlowConfig(), torch.zeros(8, 1, dtype=dtype), ("e2e", "mul", "any", "adv") * 2)
    for name, value in vars(draws).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype in (torch.float32, torch.float64), name
            assert value.device.type == "cpu"


@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_a_generator_reproduces_a_step_and_moves_nothing_else(recipe):
    config = TwinFlowConfig(recipe=recipe, data_free=True, step_focus=0.5)
    latents = torch.zeros(8, 2)
    state = torch.get_rng_state()

    def draw():
        generator = torch.Generator().manual_seed(3)
        criterion = TwinFlowLoss(config)
        return [criterion.draw(latents, generator=generator) for _ in range(2)]

    first, second = draw(), draw()
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first, second, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert not torch.equal(first[0].z, first[1].z) and not torch.equal(first[0].t, first[1].t)


@pytest.mark.parametrize("steps, grid", [
    (1, [0.999]), (2, [0.999, 0.6]), (4, [0.999, 0.8327, 0.6663, 0.5]),
])  # fmt: skip
def test_published_sampling_grids(steps, grid):
    assert sampling_grid(steps) == pytest.approx([*grid, 0.0], abs=5e-5)


def test_sampling_grid_options():
    assert sampling_grid(3, 0.0, 0.0) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert sampling_grid(8)[-2] == pytest.approx(0.3)
    u = 0.001 + 0.999 / 30
    warped = 1 - (1 - (1 - u**1.17) ** 0.8) ** 1.1
    assert sampling_grid(30, 0.001, 0.0, (1.17, 0.8, 1.1))[1] == pytest.approx(warped)
    for steps in range(1, 12):
        grid = sampling_grid(steps)
        assert len(grid) == steps + 1 and all(a > b for a, b in pairwise(grid))


@pytest.mark.parametrize("arguments, message", [
    ((0,), "steps must be an integer >= 1, got 0"), ((1.5,), "steps must be"), ((2, -0.1), "gap_start must be in"),
    ((2, 0.001, 1.0), "gap_end must be in"), ((2, 0.0, 0.5, (1.0, 0.0, 1.0)), "time_dist_ctrl must be three numbers"),
])  # fmt: skip
def test_wrong_sampling_grids(arguments, message):
    with pytest.raises(ValueError, match=f"sampling_grid: {message}"):
        sampling_grid(*arguments)


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("recipe", ["partition", "all_terms"])
def test_step_focus_puts_its_share_on_the_grid(recipe, share):
    """The queries of sampling in n steps: t on the grid, r = 0 or the next time; of the `any` rows in `partition`."""
    config = TwinFlowConfig(recipe=recipe, step_focus=share, target_step_count=4, shares=dict.fromkeys(ROLES, 1))
    roles = None if recipe == "all_terms" else ROLES * (MANY // 5)
    generator = torch.Generator().manual_seed(1)
    draws = draw_step(config, torch.zeros(MANY, 1), roles, generator, 0)
    grid = [torch.tensor(t).item() for t in sampling_grid(4)]
    queries = [(a, r) for a, b in pairwise(grid) for r in (0.0, b)]
    found = [(t, r) in queries for t, r in zip(draws.t.tolist(), draws.r.tolist(), strict=True)]
    if roles is not None:
        assert not any(on for on, role in zip(found, roles, strict=True) if role != "any")
        found = [on for on, role in zip(found, roles, strict=True) if role == "any"]
    tolerance = 5 * (share * (1 - share) / len(found)) ** 0.5
    assert abs(sum(found) / len(found) - share) <= tolerance
    if share == 1.0:
        seen = [(t, r) for t, r in zip(draws.t.tolist(), draws.r.tolist(), strict=True) if (t, r) in queries]
        for query in set(queries):
            expected = len(seen) / 8 * (2 if query[0] == grid[3] else 1)
            assert abs(seen.count(query) - expected) < 6 * expected**0.5
