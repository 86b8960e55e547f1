"""`metrics.jsonl`: strict lines, read whatever a killed process left, cut where a run goes on."""

import json
import os
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.train_runs import read_metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from twinflow.train.logging.metrics_file import append_records, keep_until

STEP = {
    "kind": "step", "step": 1, "seconds": 0.5, "loss": 0.25, "terms": {"rcgm": 0.125, "adversarial": 1.0},
    "grad_norm": 2.0, "learning_rate": 1e-4, "s_per_step": 0.5, "rows_per_s": 8.0, "peak_gb": None,
    "trajectory": [[0.5, 0.25], [-0.75, -0.75]],
}  # fmt: skip


def step(number: int) -> dict:
    return {**STEP, "step": number}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_records_come_back_in_order(file):
    assert read_metrics(file) == ([], 0)
    records = [{"kind": "start", "step": 0, "at": "2025-01-01T00:00:00+00:00"}, step(1), step(2),
               {"kind": "evaluation", "step": 2, "loss": 0.5, "terms": {"velocity": 0.5}}]  # fmt: skip
    append_records(file, records[:1])
    append_records(file, records[1:])
    assert read_metrics(file) == (records, 0)
    assert file.read_bytes().count(b"\n") == 4


def test_a_flush_is_one_write(file, monkeypatch):
    append_records(file, [step(1)])
    sizes, opened = [], Path.open

    def unbuffered(path, mode):
        raw = opened(path, mode, buffering=0)
        write = raw.write
        return SimpleNamespace(
            seek=raw.seek, read=raw.read, write=lambda data: sizes.append(len(data)) or write(data), close=raw.close
        )

    monkeypatch.setattr(Path, "open", lambda path, mode: closing(unbuffered(path, mode)))
    append_records(file, [step(k) for k in range(2, 102)])
    monkeypatch.undo()
    assert len(sizes) == 1 and len(read_metrics(file).records) == 101


def test_what_is_not_finite_is_null_in_strict_json(file):
    nan, inf = float("nan"), float("inf")
    append_records(file, [{**STEP, "loss": nan, "terms": {"rcgm": inf, "velocity": 1.0}, "trajectory": [(0.5, 0.25)]}])
    line = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line["loss"] is None and line["terms"] == {"rcgm": None, "velocity": 1.0}
    assert read_metrics(file).records == [line]


def test_a_torn_line_is_left_out_and_the_next_record_is_not(file):
    append_records(file, [step(1), step(2)])
    whole = file.read_bytes()
    for cut in range(1, len(whole) // 2):
        file.write_bytes(whole[:-cut])
        # The newline alone missing: the record is whole.
        assert read_metrics(file) == (([step(1), step(2)], 0) if cut == 1 else ([step(1)], 1)), cut
        append_records(file, [step(3)])
        assert read_metrics(file).records[-1] == step(3), cut


BAD = (
    b"not json", b"[]", b"3", b"null", b'"step"', b"{}", b'{"kind": "step"}', b'{"kind": "other", "step": 1}',
    b'{"kind": "step", "step": "1"}', b'{"kind": "step", "step": 1.5}', b'{"kind": "step", "step": true}',
    b'{"kind": "step", "step": -1}', b'{"kind": "step", "step": 1, "loss": NaN}', b"\xff\xfe", b"\0\0\0\0",
    b'{"kind": "step", "step": 1, "loss": "0.1"}', b'{"kind": "step", "step": 1, "terms": [1]}',
    b'{"kind": "step", "step": 1, "loss": 1e999}', b'{"kind": "step", "step": 1, "terms": {"rcgm": "x"}}',
    b'{"kind": "step", "step": 1, "trajectory": [[1]]}', b'{"kind": "step", "step": 1, "trajectory": [["a", 1]]}',
    b"[" * 100_000, b'{"kind": "step", "step": ' + b"9" * 5000 + b"}", b'{"kind": ["step"], "step": 1}',
)  # fmt: skip


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_damaged_line_is_counted_and_left_out(file, line):
    append_records(file, [step(1)])
    with file.open("ab") as opened:
        opened.write(line + b"\n")
    append_records(file, [step(2)])
    assert read_metrics(file) == ([step(1), step(2)], 1)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=200))
def test_no_bytes_stop_the_reader(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "metrics.jsonl"
    path.write_bytes(data)
    records, damaged = read_metrics(path)
    assert not records and damaged == sum(bool(line.strip()) for line in data.split(b"\n"))


def test_a_run_that_goes_on_takes_out_later_steps(file):
    start = {"kind": "start", "step": 0, "at": "2025-01-01T00:00:00+00:00"}
    evaluations = [{"kind": "evaluation", "step": k, "loss": 0.5, "terms": {}} for k in (2, 4)]
    append_records(file, [start, step(1), step(2), evaluations[0], step(3), step(4), evaluations[1]])
    with file.open("ab") as opened:
        opened.write(b'{"kind": "step", "st')
    assert keep_until(file, 2) == 4
    assert read_metrics(file) == ([start, step(1), step(2), evaluations[0]], 0)
    assert [path.name for path in file.parent.iterdir()] == ["metrics.jsonl"]
    unchanged = file.stat()
    assert keep_until(file, 2) == 0 and file.stat().st_ino == unchanged.st_ino
    append_records(file, [step(3)])
    assert read_metrics(file).records[-1] == step(3)


def test_cutting_what_is_not_there_does_nothing(file):
    assert keep_until(file, 5) == 0 and not file.exists()


def test_a_cut_that_fails_leaves_the_old_file(file, monkeypatch):
    append_records(file, [step(1), step(2)])
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        keep_until(file, 1)
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1
