"""Runs the test suites of `make test` and adds up what they report.

    python tests/run_suites.py [--slow] [--only NAME ...] [--limit SECONDS]

A suite that dies without a report (a sanitizer's abort, a failed build) counts as one failure, a check without tests
(lint, types) as one test. The last line is `N passed, N failed, N skipped`; the exit status is 1 where anything failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "suites"
SANITIZED = ROOT / "build" / "sanitize"
CORES = min(len(os.sched_getaffinity(0)), 8)
# -P: not the checkout before PYTHONPATH
PYTEST = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-r", "fE", "--durations=25",
          "--durations-min=0.5", "--junitxml={report}"]  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """Commands run in order until one fails; `{report}` becomes the path of the junit file that pytest writes.

    Args:
        budget: seconds that it may take on two quiet cores; more is shown, and is no failure.
        cores: 1: runs beside other suites of one core; more: runs alone, with its output on the terminal.
    """

    name: str
    budget: int
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    cores: int = 1


@dataclass
class Result:
    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def pytest_command(path: str, marks: str, slow: bool, *options: str) -> list[str]:
    return [*PYTEST, path, "-m", marks if slow else f"({marks}) and not slow", *options]


def sanitizer_suite(slow: bool) -> Suite:
    """The C++ kernels built with AddressSanitizer and UBSan into a folder of their own, and their tests."""
    cxx = os.environ.get("CXX", "c++").split()
    libraries = [subprocess.run([*cxx, f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
                 for name in ("asan", "ubsan")]  # fmt: skip
    library, temporary = SANITIZED / "lib", SANITIZED / "objects"
    build = ["env", "TWINFLOW_SANITIZE=address,undefined", "TWINFLOW_BUILD_CUDA=0", "LD_PRELOAD=", sys.executable,
             "setup.py", "-q", "build_py", "-d", str(library), "build_ext", "-b", str(library), "-t",
             str(temporary)]  # fmt: skip
    loaded = "import twinflow_kernels._C as c; assert b'__asan_report' in open(c.__file__, 'rb').read(), c.__file__"
    tests = pytest_command("tests/kernels", "not aot and not gpu", slow, "--capture=sys", "-k", "cpu-cpu or isa")
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(library),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:strict_init_order=1",  # Python itself never frees all it has
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    return Suite("sanitizers", 120, [build, [sys.executable, "-P", "-c", loaded], tests], environment)


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def suites(slow: bool) -> list[Suite]:
    """What `make test` runs on this machine."""
    here = "not aot and not gpu"
    workers = ["-n", str(CORES), "--dist", "worksteal"]
    chosen = [
        sanitizer_suite(slow),
        Suite("ahead of time", 80, [pytest_command("tests/kernels/test_aot.py", "aot", slow)]),
        Suite("interpreter", 50, [pytest_command("tests/kernels", here, slow)], {"TRITON_INTERPRET": "1"}),
        Suite("types", 60, [[sys.executable, "-m", "mypy"]]),
        Suite("lint", 5, [[sys.executable, "-m", "ruff", "check", "."]]),
        Suite("cpu", 330, [pytest_command("tests", here, slow, *workers)], cores=CORES),
    ]
    return [*chosen, Suite("gpu", 300, [pytest_command("tests", "gpu", slow)], cores=CORES)] if has_cuda() else chosen


def read_report(path: Path) -> Result:
    """Counts and skip reasons from pytest's junit file."""
    result = Result()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed += 1
        elif skip is not None:
            # Of a module skipped whole, pytest puts the reason into the text.
            whole = (skip.text or "").rpartition("Skipped: ")[2].rstrip("')\" \n")
            message = skip.get("message", "no reason given")
            result.skipped[whole if message == "collection skipped" and whole else message] += 1
        else:
            result.passed += 1
    return result


def run(suite: Suite) -> Result:
    """Runs one suite; a command that fails without a failed test in the report is a failure of its own."""
    stem, start, status = REPORTS / suite.name.replace(" ", "_"), time.perf_counter(), 0
    report, log = stem.with_suffix(".xml"), stem.with_suffix(".log")
    report.unlink(missing_ok=True)
    # One thread a process, as OpenMP's threads of two processes wait for each other's cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **suite.environment}
    if suite.cores > 1:
        print(f"\n== {suite.name} ==", flush=True)
    with log.open("w") as file:
        for command in suite.commands:
            command = [part.replace("{report}", str(report)) for part in command]
            out = None if suite.cores > 1 else file
            status = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out).returncode
            if status:
                break
    result = read_report(report) if report.exists() else Result(passed=int(status == 0))
    shown = "" if suite.cores > 1 else f"\n== {suite.name} ==\n{log.read_text()}"
    if status and not result.failed:
        shown += f"{suite.name}: exit status {status}\n"
        result.failed = 1
    print(shown, end="", flush=True)
    result.seconds = time.perf_counter() - start
    return result


def show(results: dict[str, Result], budgets: dict[str, int]) -> None:
    print("\nsuite            passed  failed  skipped  seconds  budget")
    for name, r in results.items():
        over = "  over budget" if r.seconds > budgets[name] else ""
        print(
            f"{name:<15}  {r.passed:>6}  {r.failed:>6}  {r.skipped.total():>7}  {r.seconds:>7.0f}  "
            f"{budgets[name]:>6}{over}"
        )
    if not has_cuda():
        print("gpu              not run: no CUDA device")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slow", action="store_true", help="the cases marked slow too")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these suites")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="fail where all suites together took longer")
    options = parser.parse_args()
    every = suites(options.slow)
    chosen = [suite for suite in every if not options.only or suite.name in options.only]
    if not chosen:
        parser.error(f"--only must name suites among {', '.join(suite.name for suite in every)}")
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir(parents=True)
    start = time.perf_counter()
    alone = [suite for suite in chosen if suite.cores > 1]
    beside = [suite for suite in chosen if suite.cores == 1]
    with ThreadPoolExecutor(CORES) as pool:
        done = list(pool.map(run, beside))
    done += map(run, alone)
    seconds = time.perf_counter() - start
    results = dict(zip([suite.name for suite in beside + alone], done, strict=True))
    show(results, {suite.name: suite.budget for suite in chosen})
    reasons: Counter[str] = sum((result.skipped for result in done), Counter())
    for reason, count in reasons.most_common():
        print(f"skipped {count}: {reason}")
    passed, failed = sum(result.passed for result in done), sum(result.failed for result in done)
    print(f"all suites: {seconds:.0f} s")
    if options.limit and seconds > options.limit:
        print(f"over the limit of {options.limit:.0f} s")
        failed += 1
    total = f"{passed} passed, {failed} failed, {reasons.total()} skipped"
    (REPORTS / "total.txt").write_text(total + "\n")
    print(total)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
