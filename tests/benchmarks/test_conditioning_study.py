"""The study of conditioning modes: it runs, chooses learning rates on a seed of their own, and is as committed."""

import json
import sys

import conditioning as study
import pytest
import torch

RESULTS = study.ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "conditioning_cpu.json").read_text())


def lines(text: str) -> list[list[str]]:
    return [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_quick_run_covers_every_mode_and_writes_nothing(monkeypatch, capsys, threads):
    before = {path: path.read_bytes() for path in RESULTS.iterdir()}
    monkeypatch.setattr(sys, "argv", ["conditioning.py", "--quick", "--objectives", "guided"])
    study.main()
    rows = [line for line in lines(capsys.readouterr().out) if line[0] in study.MODES]
    assert [(row[0], row[1] or "published") for row in rows] == study.VARIANTS
    for row in rows:
        values = [float(cell.split()[0]) for cell in row[2:]]
        assert all(0 <= value < 1e4 for value in values), row
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == before


def cell(mode: str, seed: int, lr: float, distance: float) -> dict:
    return {
        "objective": "unguided", "mode": mode, "cfg_time": "published", "seed": seed, "lr": lr,
        "frechet": {"few 1": distance, "few 2": 1.0},
    }  # fmt: skip


def test_each_mode_gets_the_rate_that_was_best_on_the_tuning_seed():
    def rates(mode: str, *distances: float) -> list[dict]:
        tuned = zip(study.RATES, distances, strict=True)
        return [cell(mode, study.TUNING_SEED, lr, distance) for lr, distance in tuned]

    reported = [cell(mode, 0, study.RATES[0], 0.01) for mode in study.MODES]  # must not choose
    cells = reported + rates("dual", 3.0, 2.0, 1.0) + rates("midpoint", 1.0, 2.0, 3.0)
    cells += rates("sign", 3.0, 2.0, float("inf"))
    cells += rates("dual+sign", 2.0, 1.0, 3.0) + rates("midpoint+sign", 9.0, 8.0, 7.0)
    tuning, seeds = study.waves("unguided", False, 2, cells)
    low, middle, high = study.RATES
    assert [(run["mode"], run["lr"]) for run in tuning] == [(m, lr) for m in study.MODES for lr in study.RATES]
    chosen = {"dual": high, "midpoint": low, "sign": middle, "dual+sign": middle, "midpoint+sign": high}
    assert [(run["seed"], run["mode"], run["lr"]) for run in seeds] == [(s, m, chosen[m]) for s in (0, 1)
                                                                        for m in study.MODES]  # fmt: skip


def test_only_runs_of_the_same_settings_are_kept(committed):
    settings = committed["settings"]
    assert study.kept(settings) == committed["cells"]
    assert study.kept(settings | {"rates": [1e-4]}) == []
    assert study.kept(settings | {"references": {}}) == [], "another base"


def test_the_committed_comparison_is_whole(committed):
    """Every mode of an objective at the same steps and seeds, and the table that these results give."""
    cells = [c for c in committed["cells"] if c["seed"] != study.TUNING_SEED]
    assert {c["objective"] for c in cells} >= {"unguided", "guided"}
    for objective in {c["objective"] for c in cells}:
        mine = study.found(cells, objective=objective)
        runs = {(c["mode"], c["cfg_time"]): set() for c in mine}
        for c in mine:
            runs[c["mode"], c["cfg_time"]].add((c["seed"], c["steps"]))
        wanted = [v for v in study.VARIANTS if objective == "guided" or v[1] == "published"]
        assert set(runs) == set(wanted)
        assert len({frozenset(r) for r in runs.values()}) == 1 and len(next(iter(runs.values()))) >= 2
    table = study.table(committed["cells"], committed["settings"])
    assert (RESULTS / "conditioning_cpu.md").read_text() == table + "\n"
