"""Forecasts of what else a user might run: full depth from three blocks, and what must hold between the rows."""

import gc

import environment
import pytest
import torch
import torch.nn.functional as F
from helpers import family_batches
from helpers.forecasts import Planner, shorter
from torch.nn.attention import SDPBackend, sdpa_kernel

from twinflow.lora import add_lora
from twinflow.memory.planner.gpus import GPUS
from twinflow.memory.planner.peers.forecast import peer_forecasts
from twinflow.memory.planner.peers.networks import LiveDerivative
from twinflow.memory.planner.simulation.storage_tracker import StorageTracker
from twinflow.memory.planner.workload import Workload
from twinflow.memory.presets import PRESETS

LABELS = ["published schedule", "dmd2", "sana-sprint"]


def short(name, batch=2, full=False, **settings):
    trained = dict(lora_rank=None, base="float32") if full else dict(lora_rank=8)
    return Workload(architecture=shorter(name), batch=batch, **{**trained, **settings})


def rows(workload, **settings):
    return {forecast.label: forecast for forecast in peer_forecasts(workload, **settings)}


CASES = (("qwen-image", False), ("sana-1.6b", False), ("sd3.5-medium", True), ("flux.1", False), ("z-image", False))
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("name, full", [("sana-1.6b", True), *SLOW])
def test_three_blocks_stand_for_all(name, full):
    workload = short(name, full=full)
    few, every = (peer_forecasts(workload, GPUS["a100-80gb"], whole) for whole in (False, True))
    assert [forecast.label for forecast in few] == LABELS
    for one, other in zip(few, every, strict=True):
        assert one.bytes == other.bytes, one.label
        assert one.cost.flops == pytest.approx(other.cost.flops, rel=1e-9)
        assert all(size >= 0 for size in one.bytes.values()), one.label


@pytest.fixture(scope="module")
def lora():
    return rows(short("sana-1.6b", 4))


@pytest.fixture(scope="module")
def full():
    return {batch: rows(short("sana-1.6b", batch, full=True)) for batch in (1, 4)}


def test_networks_that_are_held(lora, full):
    published, dmd2, sprint = (lora[label].bytes for label in LABELS)
    assert dmd2["weights"] == 3 * published["weights"]
    heads = 4 * 10 * 2240**2  # weights of their convolutions
    assert sprint["weights"] == pytest.approx(2 * published["weights"] + 2 * heads, rel=0.01)
    assert dmd2["adapters"] == 2 * sprint["adapters"] > 0
    assert dmd2["optimizer"] == 2 * dmd2["adapters"]
    assert dmd2["ema"] == sprint["ema"] == 0 < published["ema"]
    published, dmd2, sprint = (full[4][label].bytes for label in LABELS)
    assert dmd2["weights"] / published["weights"] == pytest.approx(2.5, rel=0.03)  # the frozen one in bf16
    assert dmd2["optimizer"] / published["optimizer"] == pytest.approx(2, rel=0.03)
    assert sprint["weights"] == pytest.approx(2 * published["weights"] + 4 * heads, rel=0.03)


@pytest.mark.parametrize("label", LABELS)
def test_rows_grow_with_the_batch(full, label):
    assert full[4][label].peak > full[1][label].peak


def test_the_published_schedule_takes_more_than_the_planned_one(lora):
    published = lora["published schedule"]
    planned = Planner(published.workload).forecast(PRESETS["checkpoint"])
    assert published.bytes["encoders"] == 5_200_000_000
    assert published.peak - published.bytes["encoders"] > planned.peak
    assert all("encoders" not in lora[label].bytes for label in LABELS[1:])


@pytest.mark.slow
def test_scores_of_attention_decide_the_derivative():
    """24 heads with (4096 + 64)^2 scores in float32; the derivative holds several such tensors."""
    sprint = rows(short("qwen-image", 1, text_tokens=64))["sana-sprint"]
    assert sprint.where.startswith("student derivative")
    assert 4 < sprint.bytes["transient"] / (24 * 4160**2 * 4) < 7


def test_a_quantised_base_has_no_derivative():
    found = rows(short("sana-1.6b", base="nf4"))
    assert list(found) == LABELS[:2]
    assert found["dmd2"].bytes["weights"] == 3 * found["published schedule"].bytes["weights"]


def test_nothing_stays_replaced(full):
    before, state = F.scaled_dot_product_attention, torch.random.get_rng_state()
    assert rows(short("sana-1.6b", 1, full=True)) == full[1]
    assert F.scaled_dot_product_attention is before
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", ["qwen_image", "flux"])
def test_a_derivative_on_meta_is_followed_as_a_real_one(family):
    student = add_lora(family_batches.make_student(family, conditioning=None), rank=4, conditioning=None)
    latents, cond, *_ = family_batches.make_batch(family, student, 4)
    peaks = []
    for device in ("cpu", "meta"):
        student.to(device)
        x, told = (
            latents.to(device),
            {name: value.to(device) if value.is_floating_point() else value for name, value in cond.items()},
        )
        t = torch.ones(4, device=device)

        def step(x=x, t=t, told=told):
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                torch.func.jvp(lambda x, t: student(x, t, t, told), (x, t), (x, t))

        step()
        gc.collect()
        if device == "cpu":
            peaks.append(environment.peak_bytes(step, torch.device("cpu")))
        else:
            with LiveDerivative(rounding=lambda count: count) as live:
                live.deriving = True
                step()
            live.close()
            peaks.append(live.peak())
    assert peaks[1] == pytest.approx(peaks[0], rel=0.001)


def test_zeros_without_memory_are_not_counted():
    with StorageTracker(rounding=lambda count: count) as live:
        zeros = torch._efficientzerotensor((100,), device="meta")
        assert live.live == 0
    assert torch._is_zerotensor(zeros)
