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


def test_lanes_of_a_group_run_at_the_same_time(monkeypatch, capfd, reports):
    """Each waits for the other's file: one after the other they would wait in vain."""
    wait = (
        "import pathlib, sys, time; me, other = sys.argv[1:]; pathlib.Path(me).touch(); end = time.time() + 20\n"
        "while not pathlib.Path(other).exists() and time.time() < end: time.sleep(0.01)\n"
        "print('met' if pathlib.Path(other).exists() else 'alone'); sys.exit(me.endswith('b'))"
    )
    a, b = str(reports / "a"), str(reports / "b")
    lanes = [Lane("a", [[*python(wait), a, b]], group="pair"), Lane("b", [[*python(wait), b, a]], group="pair")]
    monkeypatch.setattr(run_lanes, "lanes", lambda slow: [*lanes, Lane("c", [python("pass")])])
    monkeypatch.setattr(sys, "argv", ["run_lanes.py"])
    assert run_lanes.main() == 1
    shown = capfd.readouterr().out
    assert "== a ==\nmet" in shown and "== b ==\nmet" in shown and "b: exit status 1" in shown
    assert shown.splitlines()[-1] == "2 passed, 1 failed, 0 skipped"


def test_every_cpu_test_is_in_one_of_the_halves():
    cpu, memory = (next(lane for lane in run_lanes.lanes(False) if lane.name == name) for name in ("cpu", "memory"))
    chosen = {part for part in memory.commands[0] if part.startswith("tests/")}
    left_out = {part.removeprefix("--ignore=") for part in cpu.commands[0] if part.startswith("--ignore=")}
    assert chosen == left_out and len(chosen) == 3 and "tests" in cpu.commands[0]
