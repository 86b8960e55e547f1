"""Long runs in few numbers, steps that were taken again, and pages that do not grow without bound."""

import itertools
import json
import random

import pytest
from helpers.looked_at_runs import records, start
from PIL import Image

from twinflow.report import write_report
from twinflow.report.content import MOST_IMAGES, samples_content
from twinflow.report.pictures import WIDTHS, data_uris
from twinflow.report.samples import Sample, SampleSet, thinned
from twinflow.report.series import MOST_DOTS, MOST_POINTS, TERM, curves, read_series
from twinflow.train.config.run_folder import RunFolder
from twinflow.train.logging.metrics_file import append_records


@pytest.fixture(scope="module")
def measured():
    return [record for record in records(20) if record["kind"] == "step"]


def long_run(path, measured, steps: int, **more):
    append_records(path, [{**measured[k % 20], "step": k + 1, **more} for k in range(steps)])
    return read_series(path)


def test_ten_thousand_steps_are_a_small_page_with_every_extreme(tmp_path, measured):
    run = RunFolder(tmp_path)
    spike = {**measured[0], "step": 10_001, "loss": 77.0}
    long_run(run.metrics, measured, 10_000)
    append_records(run.metrics, [spike, *({**measured[1], "step": k} for k in range(10_002, 10_101))])
    series = read_series(run.metrics)
    found = curves(series)
    loss = found["columns"]["loss"]
    assert len(loss["mean"]) <= MOST_POINTS and max(loss["high"]) == 77.0
    expected = [record["loss"] for record in measured]
    assert min(loss["low"]) == pytest.approx(min(expected), rel=1e-3)
    assert found["first"][0] == 1 and found["last"][-1] == 10_100
    assert all(a + 1 == b for a, b in zip(found["last"], found["first"][1:], strict=False)), "every step is in a point"
    whole = sum(m * (b - a + 1) for m, a, b in zip(loss["mean"], found["first"], found["last"], strict=True)) / 10_100
    assert whole == pytest.approx((500 * sum(expected) + 77.0 + 99 * measured[1]["loss"]) / 10_100, rel=1e-3)
    assert len(series.trajectory.points) == MOST_DOTS and series.trajectory.seen == 4 * 10_100
    assert write_report(run).stat().st_size < 600_000


def test_a_short_run_is_shown_step_by_step(tmp_path, measured):
    found = curves(long_run(tmp_path / "metrics.jsonl", measured, 20))
    assert found["first"] == found["last"] == [*range(1, 21)]
    loss = found["columns"]["loss"]
    assert loss["mean"] == [float(f"{record['loss']:.4g}") for record in measured] and loss["low"] is None


def test_the_smoothed_curve_keeps_a_straight_line_and_calms_noise(tmp_path, measured):
    generator = random.Random(0)
    path = tmp_path / "metrics.jsonl"
    append_records(path, [{**measured[0], "step": k + 1, "loss": 2.0 + 0.001 * k,
                               "grad_norm": generator.uniform(0, 2)} for k in range(600)])  # fmt: skip
    columns = curves(read_series(path))["columns"]
    assert columns["loss"]["smooth"] == columns["loss"]["mean"]
    noise = [columns["grad_norm"][name][50:-50] for name in ("mean", "smooth")]
    assert max(noise[1]) - min(noise[1]) < 0.6 * (max(noise[0]) - min(noise[0]))


def test_values_that_are_not_there_are_gaps(tmp_path, measured):
    path = tmp_path / "metrics.jsonl"
    steps = [{**measured[k], "step": k + 1, "terms": {"rcgm": 1.0} if k % 2 else {}, "peak_gb": None} for k in range(6)]
    append_records(path, steps)
    found = curves(read_series(path))["columns"]
    assert found[TERM + "rcgm"]["mean"] == [None, 1.0] * 3 and "peak_gb" not in found


def test_steps_taken_again_replace_the_old_ones(tmp_path, measured):
    """With and without the start record between, as the file may not have been cut."""
    for between in ([start(4)], []):
        path = tmp_path / f"{len(between)}.jsonl"
        old, new = ([{**measured[k], "step": k + 1, "loss": value} for k in range(9)] for value in (1.0, 2.0))
        held = [{"kind": "evaluation", "step": step, "loss": 1.0, "terms": {}} for step in (3, 6)]
        append_records(path, [start(0), *old, *held, *between, *new[4:7]])
        series = read_series(path)
        assert series.steps == [1, 2, 3, 4, 5, 6, 7]
        assert series.columns["loss"] == [1.0] * 4 + [2.0] * 3
        assert [record["step"] for record in series.evaluations] == [3]


def test_a_run_that_was_just_resumed_ends_there(tmp_path, measured):
    path = tmp_path / "metrics.jsonl"
    append_records(path, [start(0), *({**measured[k], "step": k + 1} for k in range(9)), start(4)])
    assert read_series(path).steps == [1, 2, 3, 4] and read_series(path).last == 4


def noise(folder, count: int, size: int = 600):
    folder.mkdir(exist_ok=True)
    found = []
    for number in range(count):
        found.append(folder / f"{number}.png")
        Image.effect_noise((size, size // 2), 90 + number).convert("RGB").save(found[-1], compress_level=1)
    return found


def test_images_are_scaled_until_they_fit(tmp_path):
    paths = noise(tmp_path, 6, 400)
    sizes = {}
    for most in (10**8, 300_000, 100):
        uris = data_uris(paths, most)
        sizes[most] = sum(map(len, uris))
        assert len({len(uri) > 100 for uri in uris}) == 1
    assert sizes[10**8] > 300_000 >= sizes[300_000] > sizes[100]
    flat = tmp_path / "flat.png"
    Image.new("RGB", (400, 200)).save(flat)
    mixed = [path for noisy in paths * 2 for path in (flat, noisy)]  # those that are tried are the flat ones
    assert sum(map(len, data_uris(mixed, 500_000))) <= 500_000 < sum(map(len, data_uris(mixed, 10**8)))
    assert data_uris([tmp_path / "none.png"]) == [None] and data_uris([]) == []
    assert tuple(sorted(WIDTHS, reverse=True)) == WIDTHS


def test_many_sets_are_thinned_evenly(tmp_path):
    path = noise(tmp_path, 1, 40)[0]
    sets = [SampleSet(step, "ema", [Sample(path, "a prompt", steps, "few", 0.0, 1) for steps in (1, 2, 4, 8)])
            for step in range(1, 1001)]  # fmt: skip
    found = samples_content(sets, None)
    steps = [own["step"] for own in found["sets"]]
    assert len(steps) == MOST_IMAGES // 4 and steps[0] == 1 and steps[-1] == 1000
    gaps = {b - a for a, b in itertools.pairwise(steps)}
    assert gaps <= {6, 7}
    assert len(json.dumps(found)) < 20_000_000
    assert thinned(sets, 1) == sets[-1:] and thinned(sets[:3], 5) == sets[:3]
