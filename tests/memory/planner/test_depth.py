"""The planner's three blocks stand for all: the same bytes as every block run."""

import itertools

import pytest
from helpers.forecasts import SHORTER, Planner, shorter

from twinflow.memory.offload.activations import window_bytes
from twinflow.memory.planner.architectures import architecture_of
from twinflow.memory.planner.forecast import CUBLAS_BYTES
from twinflow.memory.planner.gpus import GPUS
from twinflow.memory.planner.simulation.meta_student import meta_student, meta_teacher
from twinflow.memory.planner.simulation.run import StepSimulation, worst_draws
from twinflow.memory.planner.simulation.shortened_model import shorten
from twinflow.memory.planner.workload import Workload
from twinflow.memory.presets import PRESETS, MemoryPreset


def both(workload: Workload, preset: MemoryPreset, schedule: str = "planned") -> None:
    """Asserts that three blocks of a kind give what all blocks give."""
    gpu = GPUS["a100-80gb"]
    few = Planner(workload, gpu).forecast(preset, schedule)
    every = Planner(workload, gpu, whole=True).forecast(preset, schedule)
    assert few.peak == every.peak, f"{few.bytes} against {every.bytes}"
    assert few.bytes == every.bytes
    assert few.cost.flops == pytest.approx(every.cost.flops, rel=1e-9)
    assert few.cost.moved == pytest.approx(every.cost.moved, rel=1e-9)


def slow_but(quick, *lists):
    """Every case; all but the quick ones are slow."""
    cases = itertools.product(*lists)
    return [pytest.param(*case, marks=[] if case in quick else pytest.mark.slow) for case in cases]


DEFERRED = ("qwen-image", "sd3.5-medium", "flux.1", "z-image"), ("40gb", "24gb", "16gb"), ("partition", "all_terms")
LORA = SHORTER, ("rows", "80gb", "checkpoint", "checkpoint-offload")


@pytest.mark.parametrize("name, preset, recipe", slow_but([("qwen-image", "24gb", "partition")], *DEFERRED))
def test_deferred_modulation(name, preset, recipe):
    both(Workload(architecture=shorter(name), batch=2, lora_rank=8, recipe=recipe), PRESETS[preset])


@pytest.mark.parametrize("name, preset", slow_but([("flux.1", "80gb"), ("sana-1.6b", "checkpoint-offload")], *LORA))
def test_lora(name, preset):
    both(Workload(architecture=shorter(name), batch=2, lora_rank=8), PRESETS[preset])


@pytest.mark.parametrize("name, preset", [
    ("sana-1.6b", "attention"), pytest.param("sd3.5-medium", "batch", marks=pytest.mark.slow),
    pytest.param("z-image", "rows", marks=pytest.mark.slow),
])  # fmt: skip
def test_all_weights_under_autocast(name, preset):
    both(Workload(architecture=shorter(name), batch=2, lora_rank=None, base="float32"), PRESETS[preset])


def test_published_schedule_and_the_other_recipe():
    workload = Workload(architecture=shorter("sana-1.6b"), batch=4, lora_rank=8)
    both(workload, PRESETS["checkpoint"], "published")
    both(workload.but(recipe="all_terms", batch=2), PRESETS["80gb"])


def test_levels_that_differ_by_block():
    workload = Workload(architecture=shorter("sana-1.6b"), batch=2, lora_rank=8)
    both(workload, MemoryPreset("mixed", ("input",) * 1 + ("products",) * 5))


@pytest.mark.slow
def test_levels_that_differ_across_lists():
    flux = Workload(architecture=shorter("flux.1"), batch=2, lora_rank=8)
    both(flux, MemoryPreset("mixed", ("attention",) * 8 + ("input",) * 4))


def test_an_offloads_window_is_within_what_is_added_for_it():
    """The forecast runs without the window of tensors on their way and adds its size: a near upper bound."""
    workload = Workload(architecture=shorter("qwen-image"), batch=2, lora_rank=8)
    preset = MemoryPreset("small window", "input", 1, offload_gb=0.3)
    window = window_bytes(300_000_000)
    reduction = shorten(workload.architecture, preset, whole=True)
    student = meta_student(workload, reduction.architecture)
    run = StepSimulation(workload, preset, student, meta_teacher(student), reduction, window=window)
    run.run(worst_draws(workload, 2))
    forecast = Planner(workload).forecast(preset)
    held = sum(forecast.bytes[part] for part in ("weights", "adapters", "optimizer", "ema")) + CUBLAS_BYTES
    passing = max(region.most for region in run.regions)
    assert passing <= forecast.peak - held <= passing + window
    assert forecast.host_bytes > window


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["80gb", "checkpoint"])
def test_whole_qwen_image(preset):
    both(Workload(architecture=architecture_of("qwen-image"), batch=4), PRESETS[preset])
