"""The planner's parts: attention as CUDA runs it, autocast, costs, the order of rows, the repeated timeline."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.forecasts import Planner
from torch import nn

from twinflow.memory.planner.costs import CostOf
from twinflow.memory.planner.gpus import GPUS
from twinflow.memory.planner.simulation import run as simulation
from twinflow.memory.planner.simulation.autocast import MetaAutocast
from twinflow.memory.planner.simulation.fused_attention import fused_attention, workspace
from twinflow.memory.planner.simulation.storage_tracker import StorageTracker, aligned
from twinflow.memory.planner.simulation.timeline import Region, Repeat, splice
from twinflow.memory.planner.workload import workload_of
from twinflow.memory.presets import PRESETS

ROWS, HEADS, WIDTH = 4352, 24, 128


def heads(dtype=torch.bfloat16, grad=True) -> list[torch.Tensor]:
    shape = (1, HEADS, ROWS, WIDTH)
    return [torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad) for _ in range(3)]


def attention_bytes(dtype, mask=None) -> tuple[int, int]:
    """Bytes kept by a forward, and the most of its backward."""
    original, given = F.scaled_dot_product_attention, heads(dtype)
    with fused_attention(), StorageTracker(workspace) as live:
        out = F.scaled_dot_product_attention(*given, attn_mask=mask)
        kept = live.live
        live.mark("backward")
        out.sum().backward()
    assert F.scaled_dot_product_attention is original
    live.close()
    return kept, live.regions[1].most


def test_attention_makes_no_matrix_of_scores():
    one = ROWS * HEADS * WIDTH * 2
    kept, most = attention_bytes(torch.bfloat16)
    assert kept == pytest.approx(one + ROWS * HEADS * 4, rel=1e-3)  # the output, and a sum per row
    sums = HEADS * ROWS * WIDTH * 4  # float32, 53 MB
    assert most == pytest.approx(kept + 3 * one + sums, rel=0.03)  # three gradients, the kernel's own
    scores = HEADS * ROWS * ROWS * 2
    assert most < scores
    for dtype, mask in ((torch.float32, None), (torch.bfloat16, torch.zeros(ROWS, dtype=torch.bool, device="meta"))):
        assert attention_bytes(dtype, mask)[0] < scores / 4


def test_autocast_casts_as_cuda_does():
    with torch.device("meta"):
        layer, norm, x = nn.Linear(256, 256), nn.LayerNorm(256), torch.empty(2, 256)
    autocast = MetaAutocast()
    before = F.linear, torch.Tensor.pow, "pow" in vars(torch.Tensor)
    with autocast, StorageTracker() as live:
        assert layer(x).dtype == torch.bfloat16
        assert norm(layer(x)).dtype == torch.float32
        assert (layer(x) @ layer(x).T).dtype == torch.bfloat16
        assert layer(x).pow(2).dtype == torch.float32
        kept = {}
        for name in ("one", "many"):
            start = live.live
            with autocast.cached():
                outputs = [layer(x) for _ in range(1 if name == "one" else 5)]
                kept[name] = live.live - start
            del outputs
        # Weight and bias are cast once; each call has an input and an output of its own.
        assert kept["one"] > 256 * 256 * 2
        assert kept["many"] - kept["one"] == 4 * 2 * 1024
    assert (F.linear, torch.Tensor.pow, "pow" in vars(torch.Tensor)) == before
    live.close()


def test_costs_by_dtype():
    cost = CostOf(GPUS["a100-80gb"])
    for dtype, rate in ((torch.bfloat16, 312e12), (torch.float32, 19.5e12)):
        a, b = (torch.empty(4096, 4096, dtype=dtype, device="meta") for _ in range(2))
        found = cost(torch.ops.aten.mm.default, (a, b), {}, torch.mm(a, b))
        assert found.flops == 2 * 4096**3
        assert found.seconds == pytest.approx(found.flops / rate)
        assert found.moved == 3 * a.numel() * a.element_size()
    added = cost(torch.ops.aten.add.Tensor, (a, b), {}, a + b)
    assert added.flops == 0 and added.seconds == pytest.approx(added.moved / 2039e9)
    assert cost(torch.ops.aten.view.default, (a, [-1]), {}, a.view(-1)).moved == 0


def test_no_other_order_of_rows_needs_more(monkeypatch):
    workload = workload_of("sana-0.6b", lora_rank=4, batch=4)
    peak = Planner(workload).forecast(PRESETS["rows"]).peak
    for order in list(itertools.permutations(simulation.WORST_LAST))[::8]:
        monkeypatch.setattr(simulation, "WORST_LAST", order)
        assert Planner(workload).forecast(PRESETS["rows"]).peak <= peak, order


def region(name, block, start, most, end, **more) -> Region:
    return Region(name, block, start, most, end, **more)


def test_a_timeline_by_hand():
    """Three blocks keep 10 bytes each and use 5 more; backward gives them back and leaves a gradient of 4."""
    forward = [region("f", f"b{i}", 10 * i, 10 * i + 15, 10 * i + 10, cost=1) for i in range(3)]
    backward = [region("b", f"b{i}", 30 - 6 * k, 30 - 6 * k + 7, 24 - 6 * k, cost=2) for k, i in enumerate((2, 1, 0))]
    repeats = {"b1": Repeat(7, ("b0", "b1", "b2"))}
    peak, costs = splice(forward + backward, repeats)
    # Ten blocks: 100 bytes kept when backward begins.
    assert (peak.total, peak.name, peak.block, peak.start) == (107, "b", "b2", 100)
    assert costs == {"f": 10, "b": 20}
    assert splice(forward + backward, {})[0].total == 37


def test_what_every_block_made_and_a_later_region_frees():
    """Casts of weights: each block makes 10 bytes, and all go when the call ends."""
    forward = [region("f", f"b{i}", 10 * i, 10 * i + 10, 10 * i + 10) for i in range(3)]
    end = region("tail", None, 30, 30, 0, freed={("f", f"b{i}"): 10 for i in range(3)})
    later = region("later", None, 0, 50, 0)
    repeats = {"b1": Repeat(7, ("b0", "b1", "b2"))}
    assert splice([*forward, end, later], repeats)[0].total == 100
    last = region("later", None, 0, 101, 0)
    assert splice([*forward, end, last], repeats)[0].total == 101
    passed_on = region("tail", None, 30, 30, 20, freed={("f", "b2"): 10})  # the last block's output alone
    assert splice([*forward, passed_on, region("later", None, 20, 35, 20)], repeats)[0].total == 105


def test_requests_are_rounded_as_the_allocator_does():
    assert [aligned(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
