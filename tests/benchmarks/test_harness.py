"""The benchmark harness: refuses wrong results, covers the cache, and writes what a reader needs."""

import json

import harness
import pytest
import torch

CPU = torch.device("cpu")


def doubling(run, peers=None, elements=1000):
    return harness.Case(
        name="doubling",
        make_inputs=lambda i: torch.randn(elements),
        run=run,
        reference=lambda x: x * 2,
        bytes_moved=8 * elements,
        peers=peers or {},
    )


@pytest.mark.parametrize("case, name", [
    (doubling(lambda x: x * 3), "twinflow"),
    (doubling(lambda x: x + x, peers={"peer": lambda x: x}), "peer"),
])  # fmt: skip
def test_a_wrong_result_is_not_timed(case, name, monkeypatch):
    monkeypatch.setattr(harness, "_rounds", lambda *_: pytest.fail("timed"))
    with pytest.raises(harness.CheckFailed, match=f"doubling: {name} is not timed"):
        harness.measure(case, CPU)


def test_in_place_operations_are_checked_on_their_own_inputs():
    """The reference must not see what the operation under test wrote."""
    harness.check(doubling(lambda x: x.mul_(2)), "twinflow", lambda x: x.mul_(2))
    with pytest.raises(harness.CheckFailed):
        harness.check(doubling(lambda x: x.mul_(3)), "twinflow", lambda x: x.mul_(3))


def test_input_sets_go_past_the_cache():
    sets = harness.input_sets(doubling(lambda x: x * 2, elements=1 << 16), 3, cache=1 << 20)
    assert sum(x.numel() * 4 for x in sets) > 2 << 20
    assert len({x.data_ptr() for x in sets}) == len(sets)


def test_result_and_file(tmp_path):
    case = doubling(lambda x: x * 2, peers={"sum": lambda x: x + x})
    result = harness.measure(case, CPU, seconds=0.0)
    ours = result["contestants"]["twinflow"]
    assert result["rounds"] == harness.MIN_ROUNDS and set(result["contestants"]) == {"twinflow", "sum"}
    assert ours["ratio"] == 1 and ours["p10_us"] <= ours["median_us"] <= ours["p90_us"] and ours["launches"] is None
    assert ours["gb_per_s"] == pytest.approx(8000 / ours["median_us"] / 1e3)
    assert ours["percent_of_copy"] == pytest.approx(100 * ours["gb_per_s"] / result["copy_gb_per_s"])
    assert ours["peak_bytes"] == pytest.approx(4000, abs=64)
    path = harness.write("doubling", [result], CPU, tmp_path)
    assert path.name.startswith("doubling_cpu_")
    machine = json.loads(path.read_text())["machine"]
    assert {"device", "torch", "triton", "python", "twinflow", "threads", "instruction_set", "commit"} <= set(machine)
    assert "sum" in harness.table([result]) and "twinflow" in harness.table([result])


def test_every_contestant_runs_once_a_round_in_a_moving_order():
    calls = []
    case = doubling(lambda x: calls.append("ours") or x * 2, peers={"peer": lambda x: calls.append("peer") or x + x})
    harness._rounds(case, {"twinflow": case.run, **case.peers}, CPU, 0.0)
    rounds = [tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert all(sorted(r) == ["ours", "peer"] for r in rounds) and len(set(rounds)) == 2
