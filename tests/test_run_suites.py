"""`make test` adds up what ran: every failure counts, also that of a suite which dies without a report."""

import sys

import pytest
import run_suites
from run_suites import Suite

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
    monkeypatch.setattr(run_suites, "REPORTS", tmp_path)
    (tmp_path / "test_all.py").write_text(TESTS)
    return tmp_path


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def run_main(monkeypatch, capfd, suites: list[Suite], *arguments: str) -> tuple[int, list[str]]:
    """The exit status and what was printed."""
    monkeypatch.setattr(run_suites, "suites", lambda slow: suites)
    monkeypatch.setattr(sys, "argv", ["run_suites.py", *arguments])
    status = run_suites.main()
    return status, capfd.readouterr().out.splitlines()


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_a_suite_of_pytest(reports, workers):
    command = [*run_suites.PYTEST, "-c", "/dev/null", str(reports / "test_all.py"), *workers]
    result = run_suites.run(Suite("all", 9, [command]))
    assert (result.passed, result.failed, dict(result.skipped)) == (1, 2, {"because": 1})


def test_a_crash_after_a_good_report_is_a_failure(reports):
    """As when a sanitizer ends the process: whatever was reported before, the suite failed."""
    command = [*run_suites.PYTEST, "-c", "/dev/null", str(reports / "test_all.py"), "-k", "test_good"]
    result = run_suites.run(Suite("all", 9, [command, python("import os; os.abort()")]))
    assert (result.passed, result.failed) == (1, 1)


@pytest.mark.parametrize(
    "code, passed, failed", [("pass", 1, 0), ("raise SystemExit(3)", 0, 1), ("import os; os.abort()", 0, 1)]
)
def test_a_suite_without_tests(code, passed, failed):
    result = run_suites.run(Suite("check", 9, [python(code)]))
    assert (result.passed, result.failed) == (passed, failed)


def test_the_total_is_the_sum_and_decides_the_status(monkeypatch, capfd):
    suites = [Suite("a", 9, [python("pass")]), Suite("b", 9, [python("raise SystemExit(1)")]),
              Suite("c", 9, [python("pass")], cores=2)]  # fmt: skip
    status, shown = run_main(monkeypatch, capfd, suites)
    assert (status, shown[-1]) == (1, "2 passed, 1 failed, 0 skipped") and "b: exit status 1" in shown
    status, shown = run_main(monkeypatch, capfd, suites, "--only", "a", "c")
    assert (status, shown[-1]) == (0, "2 passed, 0 failed, 0 skipped")


def test_time_over_the_limit_is_a_failure(monkeypatch, capfd):
    suites = [Suite("a", 0, [python("pass")])]
    assert run_main(monkeypatch, capfd, suites, "--limit", "100")[0] == 0
    status, shown = run_main(monkeypatch, capfd, suites, "--limit", "0.001")
    assert (status, shown[-1]) == (1, "1 passed, 1 failed, 0 skipped")
    assert any(line.startswith("a ") and line.endswith("over budget") for line in shown)


@pytest.mark.skipif(run_suites.CORES < 2, reason="one core")
def test_suites_of_one_core_run_at_the_same_time(monkeypatch, capfd, reports):
    """Each waits for the other's file: one after the other they would wait in vain."""
    wait = (
        "import pathlib, sys, time; me, other = sys.argv[1:]; pathlib.Path(me).touch(); end = time.time() + 20\n"
        "while not pathlib.Path(other).exists() and time.time() < end: time.sleep(0.01)\n"
        "print('met' if pathlib.Path(other).exists() else 'alone')"
    )
    a, b = str(reports / "a"), str(reports / "b")
    suites = [Suite("a", 9, [python(wait, a, b)]), Suite("b", 9, [python(wait, b, a)])]
    _, shown = run_main(monkeypatch, capfd, suites)
    assert shown.count("met") == 2


def test_every_test_of_the_cpu_is_in_its_suite():
    (command,) = next(suite.commands for suite in run_suites.suites(False) if suite.name == "cpu")
    assert "tests" in command and not [part for part in command if part.startswith("--ignore")]
