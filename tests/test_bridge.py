"""The diff2flow bridge against closed forms: Gaussian data, whose optimal predictions are known."""

import pytest
import torch

from twinflow import TwinFlowConfig
from twinflow.bridge import DiffusionToFlowBridge, require_bridge

T = 1000
BETAS = {
    "scaled_linear": torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2,  # Stable Diffusion
    "linear": torch.linspace(1e-4, 0.02, T, dtype=torch.float64),  # DDPM
}
NAMES = {"epsilon": ("epsilon", "eps"), "v_prediction": ("v_prediction", "vpred", "v")}


def abar(betas):
    return torch.cumprod(1 - BETAS[betas], 0)


@pytest.fixture(params=BETAS)
def alphas(request):
    return abar(request.param)


@pytest.mark.parametrize("kind", NAMES)
def test_the_optimal_prediction_becomes_the_optimal_velocity(alphas, kind):
    """Data N(m, s^2): E[eps | x_d], E[v | x_d] of diffusion give E[z - x | x_f] of flow matching, at every timestep."""
    bridge, t = DiffusionToFlowBridge(alphas), torch.arange(T)
    m, s = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
    a, b = alphas.sqrt()[:, None], (1 - alphas).sqrt()[:, None]
    x_d = 2 * torch.randn(T, 3, dtype=torch.float64)
    x0 = m + a * s**2 / (a**2 * s**2 + b**2) * (x_d - a * m)
    eps = b / (a**2 * s**2 + b**2) * (x_d - a * m)
    # The flow's own posterior, written with sigma alone.
    sigma, x_f = b / (a + b), x_d / (a + b)
    spread = (1 - sigma) ** 2 * s**2 + sigma**2
    velocity = sigma / spread * (x_f - (1 - sigma) * m) - m - (1 - sigma) * s**2 / spread * (x_f - (1 - sigma) * m)
    prediction = eps if kind == "epsilon" else a * eps - b * x0
    for name in NAMES[kind]:
        flow = bridge.prediction_to_flow(prediction, x_d, t, prediction_type=name)
        torch.testing.assert_close(flow, velocity, rtol=0, atol=1e-10)
    # A timestep that is given as a float is the same timestep.
    again = bridge.prediction_to_flow(prediction, x_d, t.double(), prediction_type=kind)
    torch.testing.assert_close(again, flow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trips_of_timesteps_are_exact(alphas, dtype):
    for table in (alphas, alphas.float()):
        bridge, t = DiffusionToFlowBridge(table), torch.arange(T)
        sigma = bridge.timesteps_to_sigma(t).to(dtype)
        assert torch.equal(bridge.sigma_to_timesteps(sigma), t)
        assert torch.equal(bridge.sigma_to_timesteps(-sigma), t)  # a signed time counts by its magnitude
        assert torch.equal(bridge.sigma_to_timesteps(sigma.view(-1, 1, 1, 1)), t)


def test_the_nearest_timestep_is_nearest_and_of_two_the_later():
    bridge = DiffusionToFlowBridge(abar("scaled_linear"))
    table = bridge.timesteps_to_sigma(torch.arange(T))
    sigma = torch.rand(3000, dtype=torch.float64)
    nearest = bridge.sigma_to_timesteps(sigma)
    assert torch.equal((table[nearest] - sigma).abs(), (table - sigma[:, None]).abs().amin(1))
    low, high = table[:-1], table[1:]
    middle = (low + high) / 2
    tied = (high - middle) == (middle - low)  # not all: the middle is rounded
    assert tied.sum() > 300
    assert torch.equal(bridge.sigma_to_timesteps(middle)[tied], torch.arange(1, T)[tied])
    below = torch.nextafter(middle, torch.zeros(()).double())
    assert torch.equal(bridge.sigma_to_timesteps(below)[tied], torch.arange(T - 1)[tied])


def test_fractional_timesteps_invert_sigma(alphas):
    bridge = DiffusionToFlowBridge(alphas)
    low, high = bridge.sigma_range
    sigma = low + (high - low) * torch.rand(3000, dtype=torch.float64)
    fractional = bridge.sigma_to_timesteps(sigma, interpolate=True)
    torch.testing.assert_close(bridge.timesteps_to_sigma(fractional), sigma, rtol=0, atol=1e-13)
    assert torch.equal(fractional.sort().indices, sigma.sort().indices)
    whole = bridge.sigma_to_timesteps(bridge.timesteps_to_sigma(torch.arange(T)), interpolate=True)
    assert torch.equal(whole, torch.arange(T).double())


@pytest.mark.parametrize("interpolate", [False, True])
def test_times_beyond_the_table_get_its_ends(interpolate):
    bridge = DiffusionToFlowBridge(abar("scaled_linear"))
    assert bridge.sigma_range == pytest.approx((0.02834, 0.93596), abs=1e-5)
    ends = torch.tensor([0.0, 0.02, -0.0, 0.95, 1.0, -1.0])
    found = bridge.sigma_to_timesteps(ends, interpolate=interpolate)
    assert found.tolist() == [0, 0, 0, 999, 999, 999]


def test_the_table_is_float64_whatever_the_model_computes_in():
    """In bfloat16 the table has 336 different sigmas for its 1000 timesteps."""
    reference = DiffusionToFlowBridge(abar("scaled_linear"))
    table = reference.timesteps_to_sigma(torch.arange(T))
    assert table.dtype == torch.float64 and table.to(torch.bfloat16).unique().numel() == 336
    pred, x_d = torch.randn(2, T, 4).bfloat16()
    for kind in NAMES:
        flow = reference.prediction_to_flow(pred, x_d, torch.arange(T), prediction_type=kind)
        exact = reference.prediction_to_flow(pred.double(), x_d.double(), torch.arange(T), prediction_type=kind)
        assert flow.dtype == torch.float32 and exact.dtype == torch.float64
        torch.testing.assert_close(flow.double(), exact, rtol=0, atol=2e-5)  # up to 14 times a prediction
    with pytest.raises(ValueError, match=r"alphas_cumprod must be float32 or float64, .*, got torch.bfloat16"):
        DiffusionToFlowBridge(abar("scaled_linear").bfloat16())


def test_sigma_takes_the_axes_of_what_it_multiplies():
    bridge = DiffusionToFlowBridge(abar("linear"))
    t = torch.tensor([3, 700])
    assert bridge.timesteps_to_sigma(t).shape == (2,)
    wide = bridge.timesteps_to_sigma(t, (2, 4, 8, 8))
    assert wide.shape == (2, 1, 1, 1) and torch.equal(wide.flatten(), bridge.timesteps_to_sigma(t))
    with pytest.raises(ValueError, match=r"timesteps_to_sigma: t must be the rows of \(3, 4\), got shape \(2,\)"):
        bridge.timesteps_to_sigma(t, (3, 4))


def test_it_compiles_without_a_break():
    bridge = DiffusionToFlowBridge(abar("linear"))

    def velocity(pred, x, sigma):
        t = bridge.sigma_to_timesteps(sigma, interpolate=True)
        return bridge.prediction_to_flow(pred, x, t, prediction_type="epsilon")

    given = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0.2, -0.5, 1.0])
    compiled = torch.compile(velocity, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), velocity(*given))


def test_a_table_that_reaches_zero_needs_v_prediction():
    """Zero terminal SNR: the last point is pure noise, of which epsilon says nothing about x0, and v says -x0."""
    bridge = DiffusionToFlowBridge(torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64))
    x, x0 = torch.randn(2, 1, 4, dtype=torch.float64)
    flow = bridge.prediction_to_flow(-x0, x, torch.tensor([2]), prediction_type="v")
    torch.testing.assert_close(flow, x - x0)
    with pytest.raises(ValueError, match="prediction_type must be v_prediction where alphas_cumprod reaches 0"):
        bridge.prediction_to_flow(x, x, torch.tensor([0]), prediction_type="eps")


def message(call):
    with pytest.raises(ValueError) as raised:
        call()
    return str(raised.value)


def test_known_errors_keep_their_words():
    bridge = DiffusionToFlowBridge(abar("linear"))
    x, t = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    absent = "alphas_cumprod tensor is required to build a DiffusionToFlowBridge."
    assert message(lambda: DiffusionToFlowBridge(None)) == absent
    assert message(lambda: DiffusionToFlowBridge([0.9, 0.5])) == absent
    for kind in ("sample", "flow_matching", None):
        wanted = f"Unsupported prediction_type for diff2flow bridge: {kind}"
        assert message(lambda kind=kind: bridge.prediction_to_flow(x, x, t, prediction_type=kind)) == wanted
    untimed = "TwinFlow bridging requires timesteps for sigma computation."
    assert message(lambda: bridge.timesteps_to_sigma(None)) == untimed
    assert message(lambda: bridge.prediction_to_flow(x, x, None, prediction_type="eps")) == untimed


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        (torch.ones(2, 3), r"of shape \(T,\) with T >= 2, got \(2, 3\)"),
        (torch.tensor([0.5]), r"of shape \(T,\) with T >= 2, got \(1,\)"),
        (torch.tensor([0.5, 0.9]), r"falling and in \[0, 1\), got"),
        (torch.tensor([0.5, 0.5]), r"falling and in \[0, 1\), got"),
        (torch.tensor([1.0, 0.5]), r"falling and in \[0, 1\), got"),
        (torch.tensor([0.5, -0.1]), r"falling and in \[0, 1\), got"),
        (torch.tensor([0.5, float("nan")]), r"falling and in \[0, 1\), got"),
        (torch.tensor([9, 5]), r"float32 or float64, .*, got torch.int64"),
    ],
)
def test_a_bad_table_is_refused(table, wanted):
    with pytest.raises(ValueError, match=f"DiffusionToFlowBridge: alphas_cumprod must be {wanted}"):
        DiffusionToFlowBridge(table)


def test_bad_times_are_refused():
    bridge = DiffusionToFlowBridge(abar("linear"))
    for bad in (torch.tensor([-1]), torch.tensor([1000]), torch.tensor([999.5]), torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match=r"timesteps_to_sigma: t must be in \[0, 999\], got"):
            bridge.timesteps_to_sigma(bad)
    for bad in (1.1, -1.1, float("nan")):
        with pytest.raises(ValueError, match=r"sigma_to_timesteps: sigma must be in \[-1, 1\], got"):
            bridge.sigma_to_timesteps(torch.tensor([bad]))
    with pytest.raises(TypeError, match=r"sigma_to_timesteps: sigma must be a floating tensor, got torch\.int64"):
        bridge.sigma_to_timesteps(torch.tensor([500]))
    with pytest.raises(ValueError, match=r"sigma must be \(B,\) or \(B, 1, ...\), got shape \(2, 3\)"):
        bridge.sigma_to_timesteps(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"prediction_to_flow: pred must be of x_t's shape \(2, 4\), got \(2, 3\)"):
        bridge.prediction_to_flow(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([1, 2]), prediction_type="v")


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_bridge_is_built_only_when_both_options_ask_for_it(enabled, allowed, kind):
    flags = {"diff2flow_enabled": enabled, "twinflow_allow_diff2flow": allowed}
    _, rest = TwinFlowConfig.from_flags(flags)
    for options in (flags, rest, {name: str(value).lower() for name, value in flags.items()}):
        assert require_bridge("flow_matching", options) is False
        if enabled and allowed:
            assert require_bridge(kind, options) is True
            continue
        assert message(lambda options=options: require_bridge(kind, options)) == (
            "TwinFlow requires flow-matching prediction_type. Enable diff2flow_enabled and twinflow_allow_diff2flow to "
            "bridge epsilon/v_prediction models explicitly."
        )


def test_opting_in_does_not_make_every_prediction_type_bridgeable():
    both = {"diff2flow_enabled": True, "twinflow_allow_diff2flow": True}
    assert message(lambda: require_bridge("sample", both)) == "Unsupported prediction_type for diff2flow bridge: sample"
