"""The memory planner: its bytes against a hand-computed network, against a real run, and against its targets."""

import gc
import json
from dataclasses import replace

import environment
import pytest
import torch
from helpers import family_batches
from helpers.forecasts import Planner
from torch import nn

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.lora import add_lora
from twinflow.memory.planner import forecast as planner_module
from twinflow.memory.planner.architectures import architecture_of, architectures
from twinflow.memory.planner.choose import choose, forecasts, mixed
from twinflow.memory.planner.forecast import CUBLAS_BYTES
from twinflow.memory.planner.from_student import workload_from_student
from twinflow.memory.planner.gpus import GPUS, gpu_of
from twinflow.memory.planner.report import headline
from twinflow.memory.planner.simulation.static_memory import static_memory
from twinflow.memory.planner.simulation.storage_tracker import StorageTracker
from twinflow.memory.planner.workload import Workload, workload_of
from twinflow.memory.presets import PRESETS, preset_of
from twinflow.models import load


def test_a_small_network_by_hand():
    first, second = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)
    x = torch.randn(3, 4)
    with StorageTracker(rounding=lambda count: count) as live:
        hidden = first(x)  # (3, 8): 96 bytes
        assert live.live == 96
        active = torch.relu(hidden)  # 96 more, saved for backward
        assert live.live == 192
        del hidden  # relu keeps its result only
        assert live.live == 96
        out = second(active)  # (3, 2): 24
        del active
        loss = out.sum()  # 4
        del out  # nothing keeps it
        assert live.live == 96 + 4
        live.mark("backward")
        loss.backward()
        # 4 (ones); d second (2, 8) = 64 and d active 96; that of hidden 96; d first (8, 4) = 128. Saved: 96.
        del loss
    assert live.live == 64 + 128  # the gradients
    # The most: gradient of hidden being made from that of active, with d second, both ones, loss and saved alive.
    assert live.regions[1].most == 4 + 4 + 64 + 96 + 96 + 96


def test_views_and_inputs_are_counted_once():
    x = torch.randn(100)
    with StorageTracker(rounding=lambda count: count) as live:
        live.watch(x)
        live.watch(x[10:])
        views = [x.view(10, 10), x[:5], x.expand(3, 100)]
        x.add_(1)
        assert live.live == 400
        copied = x + 1
        views.append(copied.view(4, 25))
        del copied
        assert live.live == 800
        views.clear()
        assert live.live == 400
    live.close()


@pytest.mark.parametrize("family", ["qwen_image", "sana"])
def test_a_real_step_is_followed_as_the_profiler_sees_it(family):
    student = add_lora(family_batches.make_student(family, conditioning=None), rank=4)
    teacher = EMATeacher(student, 0.9)
    batch = family_batches.make_batch(family, student, 4)
    criterion = TwinFlowLoss(TwinFlowConfig())
    draws = criterion.draw(batch[0], torch.Generator().manual_seed(0))

    def step() -> None:
        student.zero_grad(set_to_none=True)
        criterion.backward(student, *batch, teacher=teacher, draws=draws)

    step()
    gc.collect()
    seen = environment.peak_bytes(step, torch.device("cpu"))
    student.zero_grad(set_to_none=True)
    with StorageTracker(rounding=lambda count: count) as live:
        step()
    live.close()
    assert live.peak() == pytest.approx(seen, rel=0.05)


TARGETS = [
    # model, preset, most GB: the project's targets for a LoRA of rank 64 at 1024x1024, batch 4, N = 2
    ("qwen-image", "80gb", 75.0),
    ("qwen-image", "checkpoint", 57.0),
    ("sd3.5-large", "checkpoint", 22.0),
]


@pytest.mark.parametrize("model, preset, most", TARGETS)
def test_targets(model, preset, most):
    forecast = Planner(workload_of(model, lora_rank=64)).forecast(PRESETS[preset])
    assert 0.7 * most < forecast.peak / 1e9 <= most, forecast.bytes
    assert sum(forecast.bytes.values()) == forecast.peak


def test_qwen_image_is_what_is_known_of_it():
    forecast = Planner(workload_of("qwen-image"), GPUS["a100-80gb"]).forecast(PRESETS["rows"])
    assert forecast.bytes["weights"] == pytest.approx(40.86e9, rel=1e-3)  # 20.43 B parameters in bf16
    lora = forecast.bytes["adapters"] / 4
    assert lora == pytest.approx(425.3e6 + 10.2e6, rel=1e-2)  # float32: the adapters and the second embedder
    assert forecast.bytes["optimizer"] == 2 * forecast.bytes["adapters"]
    # 73.1 + 1.85 TFLOP a row forward, about 97.7 more backward (arithmetic, linear layers and attention)
    assert forecast.cost.flops == pytest.approx(1569e12, rel=0.03)


def test_a_large_batch_needs_little_more():
    few, many = (Planner(workload_of("qwen-image", batch=n)).forecast(PRESETS["80gb"]).peak for n in (4, 24))
    assert 0 < many - few < 1e9


def test_rows_beyond_those_that_run_are_added_exactly(monkeypatch):
    architecture = replace(architecture_of("sana-1.6b"), config={"num_layers": 2})
    workload = Workload(architecture=architecture, batch=7, lora_rank=8)
    added = Planner(workload).forecast(PRESETS["checkpoint"])
    monkeypatch.setattr("twinflow.memory.planner.forecast._MICRO_BATCHES", 7)
    run = planner_module.Planner(workload).forecast(PRESETS["checkpoint"])
    assert added.peak == pytest.approx(run.peak, abs=50_000)  # masks and sums of a few rows
    assert run.bytes["step"] > Planner(workload.but(batch=4)).forecast(PRESETS["checkpoint"]).bytes["step"]


def test_smaller_bases_and_optimizers():
    workload = workload_of("sd3.5-large", batch=1)
    plain = Planner(workload).forecast(PRESETS["checkpoint"])
    int8 = Planner(workload.but(base="int8")).forecast(PRESETS["checkpoint"])
    nf4 = Planner(workload.but(base="nf4", optimizer="adamw8bit")).forecast(PRESETS["checkpoint"])
    assert 0.5 < int8.bytes["weights"] / plain.bytes["weights"] < 0.52
    assert 0.25 < nf4.bytes["weights"] / plain.bytes["weights"] < 0.29
    assert nf4.bytes["optimizer"] == pytest.approx(plain.bytes["optimizer"] / 4, rel=0.03)
    assert int8.bytes["transient"] > plain.bytes["transient"]  # the weight made anew


def test_choice_by_budget():
    planner = Planner(workload_of("sana-1.6b", lora_rank=8, batch=2), GPUS["rtx-4090"])
    known = forecasts(planner)
    by_name = {f.name: f for f in known}
    assert choose(planner, 1000, known).name == "batch"
    between = (by_name["80gb"].peak + by_name["checkpoint"].peak) / 2e9
    found = choose(planner, between, known)
    assert found.name == "auto" and found.fits(between)
    assert found.cost.seconds < by_name["checkpoint"].cost.seconds
    kept = found.preset.saved.count("products")
    assert not planner.forecast(mixed(20, kept + 2, PRESETS["checkpoint"])).fits(between * 0.98)
    with pytest.raises(ValueError, match=r"memory must be at least \d\.\d GB .* which preset '\w+' needs, got 1 GB"):
        choose(planner, 1, known)


def test_a_loaded_model_is_planned_as_the_named_one():
    tiny = family_batches.tiny_transformer("sd3")
    deeper = type(tiny)(**{**family_settings(tiny), "num_layers": 5}).to(torch.bfloat16)
    student = add_lora(load(deeper), rank=4)
    workload = workload_from_student(student, resolution=128, batch=2, text_tokens=7)
    assert workload.lora_rank == 4 and workload.conditioning == "dual" and workload.base == "bfloat16"
    forecast = Planner(workload).forecast(PRESETS["rows"])
    frozen = [p for p in [*student.parameters(), *student.buffers()] if not p.requires_grad]
    exact = sum(-(-p.untyped_storage().nbytes() // 512) * 512 for p in frozen)
    assert forecast.bytes["weights"] == exact
    lora = sum(-(-p.untyped_storage().nbytes() // 512) * 512 for p in student.parameters() if p.requires_grad)
    assert forecast.bytes["adapters"] == forecast.bytes["ema"] == lora
    assert forecast.bytes["workspace"] >= CUBLAS_BYTES
    # A LoRA on the last block alone is planned as one on every block: too much, but not too little.
    last = add_lora(load(type(tiny)(**{**family_settings(tiny), "num_layers": 5})), targets=("4.attn.to_q",))
    assert workload_from_student(last, resolution=128).lora_targets == ("attn.to_q",)


def family_settings(network: nn.Module) -> dict:
    return {k: v for k, v in dict(network.config).items() if not k.startswith("_")}


def test_torch_random_state_stays():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = planner_module.Planner(workload_of("sana-0.6b", batch=2)).forecast(PRESETS["rows"])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert planner_module.Planner(workload_of("sana-0.6b", batch=2)).forecast(PRESETS["rows"]) == first


@pytest.mark.parametrize("call, message", [
    (lambda: gpu_of("a100"), r"gpu must be .*a100-80gb or a100-40gb.*got 'a100'; or give memory_gb"),
    (lambda: workload_of("qwen"), r"model must be qwen-image.*got 'qwen'"),
    (lambda: preset_of("80"), r"preset must be auto or 80gb.*got '80'"),
    (lambda: workload_of("qwen-image", batch=0), "batch must be an integer >= 1, got 0"),
    (lambda: workload_of("qwen-image", lora_rank=2.5), "lora_rank must be an integer >= 1, got 2.5"),
    (lambda: workload_of("qwen-image", resolution=1000), "resolution must be a multiple of 16 pixels, got 1000"),
    (lambda: workload_of("qwen-image", base="int4"), "base must be one of bfloat16, float32, int8, nf4, got 'int4'"),
    (lambda: workload_of("sana-1.6b", base="nf4"), "base must be bfloat16 or float32 where all weights are trained"),
    (lambda: workload_of("qwen-image", recipe="dmd"), "recipe must be one of partition, all_terms, got 'dmd'"),
    (lambda: workload_from_student(nn.Linear(2, 2)), "student must be a model of Qwen.*got Linear; choose a preset by"),
    (lambda: Planner(workload_of("sana-0.6b")).forecast(mixed(5, 2, PRESETS["checkpoint"])),
     "saved must have 28 levels for sana-0.6b, got 5"),
])  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_model_has_its_published_size():
    sizes = {"qwen-image": 20.43, "sd3.5-medium": 2.47, "sd3.5-large": 8.06, "sana-1.6b": 1.6, "sana-0.6b": 0.59,
             "flux.1": 11.9, "z-image": 6.15}  # fmt: skip
    assert set(sizes) == set(architectures())
    for model, billions in sizes.items():
        made = Planner(workload_of(model, lora_rank=1, batch=1))._model(PRESETS["rows"])
        held = static_memory(made.student, made.teacher, "adamw", made.reduction)
        assert held.weights / 2e9 == pytest.approx(billions, rel=0.03), model


@pytest.mark.parametrize("model, rank, name", [("sana-0.6b", None, "rows"), ("sd3.5-large", 64, "checkpoint")])
def test_the_committed_table_is_what_the_planner_says(model, rank, name):
    report = json.loads((environment.ROOT / "benchmarks" / "results" / "will_it_fit.json").read_text())
    workload = workload_of(model, lora_rank=rank)
    (group,) = [g for g in report["forecasts"] if g["workload"] == headline(workload)]
    (line,) = [f for f in group["forecasts"] if f["name"] == name]
    peak = Planner(workload).forecast(PRESETS[name]).peak
    assert peak == line["peak_bytes"]
