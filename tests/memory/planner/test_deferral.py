"""The planner on deferred modulation, packed bases and 8-bit Adam: bytes by hand, times, and which presets apply."""

import json
from dataclasses import replace

import environment
import pytest
import torch
from helpers import family_batches
from helpers.forecasts import Planner, shorter

from twinflow.lora import add_lora
from twinflow.memory import quantise_base
from twinflow.memory.planner import forecast as planner_module
from twinflow.memory.planner.architectures import architecture_of
from twinflow.memory.planner.choose import choose, forecasts
from twinflow.memory.planner.costs import CostOf
from twinflow.memory.planner.from_student import workload_from_student
from twinflow.memory.planner.gpus import GPUS
from twinflow.memory.planner.overview import cards, deferral_rows, rows
from twinflow.memory.planner.report import gain, headline, notes
from twinflow.memory.planner.simulation.deferral import applicable, modulation_sizes
from twinflow.memory.planner.simulation.static_memory import TRAFFIC
from twinflow.memory.planner.workload import Workload, workload_of
from twinflow.memory.presets import PRESETS, MemoryPreset
from twinflow.models import load

A100 = GPUS["a100-40gb"]
NAMES = list(PRESETS)
PLAIN = NAMES[: NAMES.index("40gb")]
QWEN = 60 * 2 * (3072 * 18432 + 18432) + (3072 * 6144 + 6144)  # img_mod and txt_mod of each block, norm_out
SD3_LARGE = (
    37 * 2 * (2432 * 6 * 2432 + 6 * 2432)  # norm1 and norm1_context; the last block's context has no gates and MLP
    + (2432 * 6 * 2432 + 6 * 2432) + (2432 * 2 * 2432 + 2 * 2432) + (2432 * 2 * 2432 + 2 * 2432)
)  # fmt: skip


@pytest.fixture(scope="module")
def qwen():
    planner = Planner(workload_of("qwen-image"), A100)
    return {name: planner.forecast(PRESETS[name]) for name in ("checkpoint", "40gb", "24gb", "16gb")}


@pytest.fixture(scope="module")
def seven_blocks():
    planner = Planner(short(), A100)
    return planner, forecasts(planner)


def short(name="qwen-image", **settings) -> Workload:
    return Workload(architecture=shorter(name), **{"batch": 2, "lora_rank": 8, **settings})


def test_modulation_by_hand(qwen):
    assert sum(modulation_sizes(architecture_of("qwen-image")).values()) == QWEN
    assert sum(modulation_sizes(architecture_of("sd3.5-large")).values()) == SD3_LARGE
    assert modulation_sizes(architecture_of("sana-1.6b")) == {}
    plain, deferred = qwen["checkpoint"], qwen["40gb"]
    assert deferred.deferred_bytes == deferred.host_bytes == 2 * QWEN
    assert plain.bytes["weights"] - deferred.bytes["weights"] == 2 * QWEN
    assert plain.host_bytes == 0
    # A differentiated row's vectors, and the gradients of three others' that wait: 4.4 MB each.
    row = 2 * (60 * 12 + 2) * 3072
    assert 4 * row < deferred.bytes["step"] - plain.bytes["step"] < 10 * row


def test_targets_on_smaller_cards(qwen):
    assert 37e9 < qwen["40gb"].peak <= 39e9, qwen["40gb"].bytes
    assert 14e9 < qwen["24gb"].peak <= 19e9, qwen["24gb"].bytes
    assert qwen["24gb"].fits(GPUS["rtx-5080"].usable_gb)
    assert qwen["16gb"].peak < qwen["24gb"].peak - 0.8e9
    assert qwen["16gb"].offloaded_bytes > 1.5e9 and qwen["16gb"].deferred_bytes == 2 * QWEN
    assert 1.0 < qwen["40gb"].cost.seconds / qwen["checkpoint"].cost.seconds < 1.15


def test_weights_pass_twice_and_are_hidden_by_nothing():
    seconds = {}
    for bandwidth in (12.5, 25.0):
        planner = Planner(short(), replace(A100, host_gb_s=bandwidth))
        found = planner.forecast(PRESETS["40gb"])
        seconds[bandwidth] = found.cost.seconds
    assert seconds[12.5] - seconds[25.0] == pytest.approx(2 * found.deferred_bytes / 25e9)


def test_no_pass_in_backward_where_nothing_upstream_is_trained():
    upstream, frozen = short(), short(conditioning="midpoint", lora_targets=("attn.to_q",))
    passes = []
    for workload in (upstream, frozen):
        found = [Planner(workload, replace(A100, host_gb_s=b)).forecast(PRESETS["40gb"]) for b in (12.5, 25.0)]
        passes.append((found[0].cost.seconds - found[1].cost.seconds) / (found[0].deferred_bytes / 25e9))
    assert passes == pytest.approx([2, 1])


def test_presets_that_do_not_apply_are_absent():
    assert list(applicable(workload_of("qwen-image"))) == NAMES
    for workload in (workload_of("qwen-image", lora_rank=None), workload_of("sana-1.6b", lora_rank=8)):
        assert list(applicable(workload)) == PLAIN
    adapted = workload_of("qwen-image", lora_targets=("attn.to_q", "img_mod.1"))
    assert list(applicable(adapted)) == PLAIN
    assert list(applicable(workload_of("qwen-image").but(deferrable=False))) == PLAIN
    wide = list(applicable(workload_of("qwen-image", base="float32")))
    assert wide == [*PLAIN, "40gb", "40gb-offload"]
    packed = list(applicable(workload_of("qwen-image", base="int8")))
    assert packed == [*PLAIN, "40gb", "40gb-offload", "32gb"]
    planner = Planner(workload_of("sana-0.6b"))
    assert list(planner.presets) == PLAIN
    with pytest.raises(ValueError, match="preset must be one that applies, got '40gb', which is for a LoRA"):
        planner.forecast(PRESETS["40gb"])
    with pytest.raises(ValueError, match=r"got '40gb', which defers modulation: sana-0\.6b has no layers for it"):
        Planner(workload_of("sana-0.6b", lora_rank=4)).forecast(PRESETS["40gb"])
    with pytest.raises(ValueError, match="got '24gb', which quantises a bfloat16 base, not one of float32"):
        Planner(workload_of("qwen-image", base="float32")).forecast(PRESETS["24gb"])


def test_a_preset_changes_the_workload():
    workload = workload_of("qwen-image")
    assert (workload.under(PRESETS["24gb"]).base, workload.under(PRESETS["24gb"]).optimizer) == ("nf4", "adamw8bit")
    assert workload.under(PRESETS["40gb"]) == workload
    assert workload.but(optimizer="sgd").under(PRESETS["24gb"]).optimizer == "sgd"
    assert workload.but(optimizer="adamw8bit").under(PRESETS["40gb"]).optimizer == "adamw8bit"


@pytest.mark.parametrize("form, preset", [("nf4", "24gb"), ("int8", "32gb")])
def test_packed_weights_as_they_are_on_a_card(form, preset):
    tiny = family_batches.tiny_transformer("sd3")
    settings = {k: v for k, v in dict(tiny.config).items() if not k.startswith("_")}
    student = add_lora(load(type(tiny)(**{**settings, "num_layers": 5}).to(torch.bfloat16)), rank=4)
    planner = Planner(workload_from_student(student, resolution=128, batch=2, text_tokens=7))
    found = planner.forecast(PRESETS[preset])
    modulation = student.modulation_layers()
    quantise_base(student.network, form, skip=list(modulation))
    assert workload_from_student(student, resolution=128).base == form
    deferred = {id(p) for layer in modulation.values() for p in layer.parameters()}
    held = [p for p in [*student.parameters(), *student.buffers()] if not p.requires_grad and id(p) not in deferred]
    exact = sum(-(-p.untyped_storage().nbytes() // 512) * 512 for p in held)
    assert found.bytes["weights"] == exact
    assert found.deferred_bytes == sum(p.numel() * 2 for layer in modulation.values() for p in layer.parameters())
    quantise_base(whole := add_lora(load(type(tiny)(**settings)), rank=4), form)
    assert not workload_from_student(whole, resolution=128).deferrable  # its modulation is packed


def test_a_packed_weight_is_read_and_the_full_one_written():
    cost = CostOf(A100)
    packed, x = (torch.empty(n, dtype=d, device="meta") for n, d in ((520, torch.uint8), (1, torch.bfloat16)))
    arguments = (packed, x, "nf4", 32, 32, torch.bfloat16)
    found = cost(torch.ops.twinflow.dequantise.default, arguments, {}, torch.ops.twinflow.dequantise(*arguments))
    assert found.moved == 520 + 2 + 2 * 32 * 32


def test_the_full_weight_is_made_anew_and_let_go():
    """Its bytes come beside a plain base's, and once: what is kept for backward does not grow with the layers."""
    plain, packed = (Planner(short(base=base)).forecast(MemoryPreset("one", "all", 1)) for base in ("bfloat16", "nf4"))
    largest = 2 * 4 * 3072 * 3072
    assert packed.bytes["saved"] <= plain.bytes["saved"] + 1e6
    assert packed.bytes["transient"] <= plain.bytes["transient"] + 1.1 * largest


def test_8_bit_adam_moves_less():
    plain, small = (Planner(short(optimizer=o), A100).forecast(PRESETS["40gb"]) for o in ("adamw", "adamw8bit"))
    trained = plain.bytes["adapters"] / 4
    assert plain.cost.moved - small.cost.moved == pytest.approx((TRAFFIC["adamw"] - 16) * trained, rel=0.01)
    assert small.bytes["optimizer"] < 0.27 * plain.bytes["optimizer"]


@pytest.mark.slow  # test_planner.py adds rows without deferral
def test_rows_beyond_those_that_run(monkeypatch):
    workload = short(batch=8)
    added = Planner(workload).forecast(PRESETS["40gb"])
    monkeypatch.setattr("twinflow.memory.planner.forecast._MICRO_BATCHES", 8)
    run = planner_module.Planner(workload).forecast(PRESETS["40gb"])
    assert added.peak == pytest.approx(run.peak, abs=60_000)


def test_a_large_batch_needs_little_more(qwen):
    many = Planner(workload_of("qwen-image", batch=24)).forecast(PRESETS["40gb"])
    assert 0 < many.peak - qwen["40gb"].peak < 0.5e9


@pytest.mark.slow  # test_planner.py chooses a mixture without deferral
def test_what_is_over_keeps_products(seven_blocks):
    planner, known = seven_blocks
    by_name = {f.name: f for f in known}
    usable = by_name["40gb"].peak / 1e9 + 1.0
    assert not any(by_name[name].fits(usable) for name in PLAIN)
    found = choose(planner, usable, known)
    assert found.name == "auto" and found.preset.defer and found.fits(usable) and "products" in found.preset.saved
    assert by_name["40gb"].cost.seconds > found.cost.seconds


def test_weights_as_they_are_come_before_packed_ones():
    """Within each of them, the order of the presets is that of the least times, in the committed table."""
    report = json.loads((environment.ROOT / "benchmarks" / "results" / "will_it_fit.json").read_text())
    (group,) = [g for g in report["forecasts"] if g["workload"] == headline(workload_of("qwen-image", lora_rank=64))]
    found = group["forecasts"]
    assert [line["name"] for line in found] == NAMES
    for base in ("bfloat16", "int8", "nf4"):
        seconds = [line["seconds"] for line in found if line["base"] == base]
        assert seconds and seconds == sorted(seconds)
    bases = [line["base"] for line in found]
    assert bases == sorted(bases, key=("bfloat16", "int8", "nf4").index)


def test_a_refusal_names_a_rank_that_fits(qwen):
    planner = Planner(workload_of("qwen-image"))
    with pytest.raises(ValueError, match=r"at least 14\.\d GB .* preset '16gb' needs, got 12 GB; rank 32 would fit"):
        choose(planner, 12.0, [replace(f, cost=None) for f in qwen.values()] + plain_stand_ins(planner, qwen))


def plain_stand_ins(planner, qwen) -> list:
    """Forecasts of the others that need not be made: none needs less."""
    made = {f.name for f in qwen.values()}
    return [replace(qwen["checkpoint"], preset=p) for name, p in planner.presets.items() if name not in made]


def test_a_row_for_16_gb(qwen):
    assert list(cards().items())[:3] == [(16.4, "rtx-5080"), (25.0, "rtx-4090"), (33.3, "rtx-5090")]
    assert cards()[84.5] == "a100-80gb, h100"
    (row,) = rows([list(qwen.values())])
    assert row[:3] == ["qwen-image", "LoRA r=64", "partition"]
    assert row[3] == row[4] == f"24gb {qwen['24gb'].peak / 1e9:.1f}" and row[6] == f"40gb {qwen['40gb'].peak / 1e9:.1f}"


def test_where_deferring_pays(qwen):
    found = list(qwen.values())
    (row,) = deferral_rows([found, found[:1]])
    assert row[:3] == ["qwen-image", "13.6", "33%"] and len(row) == 7
    assert "Modulation is 13.6 of 40.9 GB of weights (33%); deferring it saves 13.6 GB for 0." in gain(found)
    assert gain(found[:1]) == ""
    said = " ".join(notes(found, 42.0, "a card"))
    assert "modulation weights in pinned host memory: 40gb, 24gb, 16gb; nf4 base: 24gb, 16gb; counts on" in said
    assert "as if nothing ran meanwhile" in said
