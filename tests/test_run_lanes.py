"""`make test` adds up what really ran: every failure counts, also that of a lane which dies without a report."""

import sys

import pytest
import run_lanes
from run_lanes import Lane

TESTS = """
import os, pytest
def test_good(): pass
def test_bad(): assert False
@pytest.mark.skip(reason="because")
def test_left_out(): pass
@pytest.fixture
def broken(): raise OSError
def test_error(broken): pass
"""


@pytest.fixture(autouse=True)
def reports(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lanes, "REPORTS", tmp_path)
    (tmp_path / "test_all.py").write_text(TESTS)
    return tmp_path


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_pytest_lane(reports):
    command = [*run_lanes.PYTEST, "-q", "-c", "/dev/null", str(reports / "test_all.py"), "--junitxml={report}"]
    result = run_lanes.run(Lane("all", [command]))
    assert (result.passed, result.failed, dict(result.skipped)) == (1, 2, {"because": 1})


def test_a_crash_after_a_good_report_is_a_failure(reports):
    """As when a sanitizer ends the process: whatever was reported before, the lane failed."""
    command = [
        *run_lanes.PYTEST,
        "-q",
        "-c",
        "/dev/null",
        str(reports / "test_all.py"),
        "-k",
        "test_good",
        "--junitxml={report}",
    ]
    result = run_lanes.run(Lane("all", [command, python("import os; os.abort()")]))
    assert (result.passed, result.failed) == (1, 1)


@pytest.mark.parametrize(
    "code, passed, failed", [("pass", 1, 0), ("raise SystemExit(3)", 0, 1), ("import os; os.abort()", 0, 1)]
)
def test_a_lane_without_tests(code, passed, failed):
    result = run_lanes.run(Lane("check", [python(code)]))
    assert (result.passed, result.failed) == (passed, failed)


def test_the_total_is_the_sum_and_decides_the_status(monkeypatch, capsys):
    lanes = [Lane("a", [python("pass")]), Lane("b", [python("raise SystemExit(1)")]), Lane("c", [python("pass")])]
    monkeypatch.setattr(run_lanes, "lanes", lambda slow: lanes)
    monkeypatch.setattr(sys, "argv", ["run_lanes.py"])
    assert run_lanes.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 1 failed, 0 skipped"
    monkeypatch.setattr(sys, "argv", ["run_lanes.py", "--only", "a", "c"])
    assert run_lanes.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"
