"""Runs the lanes of `make test`, all of them, and adds up what they report.

    python tests/run_lanes.py [--slow] [--only NAME ...]

A lane that dies without a report (a sanitizer's abort, a failed build) counts as one failure, a check without tests
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
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "lanes"
SANITIZED = ROOT / "build" / "sanitize"
PYTEST = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider"]  # -P: not the checkout before PYTHONPATH
# A half of the CPU tests by time; one thread each, as OpenMP's threads of two processes wait for each other's cores.
MEMORY = ["memory", "train", "cli/test_plan.py"]
ALONE = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Lane:
    """Commands run in order until one fails; `{report}` becomes the path of the junit file that pytest writes.

    Lanes of one group that stand together run at the same time; their output comes when they are done.
    """

    name: str
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    group: str = ""


@dataclass
class Result:
    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def pytest_lane(
    name: str, paths: list[str], marks: str, slow: bool, environment: dict[str, str] | None = None, group: str = ""
) -> Lane:
    chosen = marks if slow else f"({marks}) and not slow"
    return Lane(name, [[*PYTEST, *paths, "-m", chosen, "--junitxml={report}"]], environment or {}, group)


def sanitizer_lane(slow: bool) -> Lane:
    """The C++ kernels built with AddressSanitizer and UBSan into a folder of their own, and their tests."""
    cxx = os.environ.get("CXX", "c++").split()
    libraries = [subprocess.run([*cxx, f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
                 for name in ("asan", "ubsan")]  # fmt: skip
    library, temporary = SANITIZED / "lib", SANITIZED / "objects"
    build = ["env", "TWINFLOW_SANITIZE=address,undefined", "TWINFLOW_BUILD_CUDA=0", "LD_PRELOAD=", sys.executable,
             "setup.py", "-q", "build_py", "-d", str(library), "build_ext", "-b", str(library), "-t",
             str(temporary)]  # fmt: skip
    loaded = "import twinflow_kernels._C as c; assert b'__asan_report' in open(c.__file__, 'rb').read(), c.__file__"
    tests = pytest_lane("", ["tests/kernels"], "not aot and not gpu", slow).commands[0]
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(library),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:strict_init_order=1",  # Python itself never frees all it has
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    return Lane(
        "sanitizers",
        [build, [sys.executable, "-P", "-c", loaded], [*tests, "--capture=sys", "-k", "cpu-cpu or isa"]],
        environment,
    )


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def lanes(slow: bool) -> list[Lane]:
    """What `make test` runs on this machine."""
    memory = [f"tests/{name}" for name in MEMORY]
    others = ["tests", *(f"--ignore={path}" for path in memory)]
    found = [
        Lane("lint", [[sys.executable, "-m", "ruff", "check", "."]]),
        Lane("types", [[sys.executable, "-m", "mypy"]]),
        pytest_lane("cpu", others, "not aot and not gpu", slow, ALONE, "halves"),
        pytest_lane("memory", memory, "not aot and not gpu", slow, ALONE, "halves"),
        pytest_lane("interpreter", ["tests/kernels"], "not aot and not gpu", slow, {"TRITON_INTERPRET": "1"}),
        pytest_lane("ahead of time", ["tests/kernels/test_aot.py"], "aot", slow),
        sanitizer_lane(slow),
    ]
    return [*found, pytest_lane("gpu", ["tests"], "gpu", slow)] if has_cuda() else found


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


def run_together(lanes: list[Lane]) -> list[Result]:
    """Runs lanes at the same time, and shows the output of each when all are done."""
    if len(lanes) == 1:
        return [run(lanes[0])]
    print(f"\nat the same time: {', '.join(lane.name for lane in lanes)}", flush=True)
    logs = [REPORTS / f"{lane.name.replace(' ', '_')}.log" for lane in lanes]
    with ThreadPoolExecutor(len(lanes)) as pool:
        results = list(pool.map(run, lanes, logs))
    for lane, log in zip(lanes, logs, strict=True):
        print(f"\n== {lane.name} ==\n{log.read_text()}", flush=True)
    return results


def run(lane: Lane, log: Path | None = None) -> Result:
    """Runs one lane; a command that fails without a failed test in the report is a failure of its own.

    Args:
        lane: the lane.
        log: where its output goes; None: to the terminal.
    """
    report = REPORTS / f"{lane.name.replace(' ', '_')}.xml"
    report.unlink(missing_ok=True)
    if log is None:
        print(f"\n== {lane.name} ==", flush=True)
    with nullcontext() if log is None else log.open("w") as out:
        return _run(lane, report, out)


def _run(lane: Lane, report: Path, out: TextIO | None) -> Result:
    start, status = time.perf_counter(), 0
    for command in lane.commands:
        command = [part.replace("{report}", str(report)) for part in command]
        environment = {**os.environ, **lane.environment}
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out).returncode
        if status:
            break
    result = read_report(report) if report.exists() else Result(passed=int(status == 0))
    if status and not result.failed:
        print(f"{lane.name}: exit status {status}", file=out)
        result.failed = 1
    result.seconds = time.perf_counter() - start
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slow", action="store_true", help="the cases marked slow too")
    parser.add_argument("--only", nargs="*", help="names of lanes")
    options = parser.parse_args()
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir(parents=True)
    chosen = [lane for lane in lanes(options.slow) if not options.only or lane.name in options.only]
    if not chosen:
        parser.error(f"--only must name lanes among {', '.join(lane.name for lane in lanes(options.slow))}")
    results: dict[str, Result] = {}
    for _, group in groupby(chosen, key=lambda lane: lane.group or lane.name):
        together = list(group)
        results |= zip([lane.name for lane in together], run_together(together), strict=True)
    reasons: Counter[str] = sum((result.skipped for result in results.values()), Counter())
    print("\nlane             passed  failed  skipped  seconds")
    for name, r in results.items():
        print(f"{name:<15}  {r.passed:>6}  {r.failed:>6}  {r.skipped.total():>7}  {r.seconds:>7.0f}")
    if not has_cuda():
        print("gpu              not run: no CUDA device")
    for reason, count in reasons.most_common():
        print(f"skipped {count}: {reason}")
    passed, failed = (sum(getattr(r, name) for r in results.values()) for name in ("passed", "failed"))
    total = f"{passed} passed, {failed} failed, {reasons.total()} skipped"
    (REPORTS / "total.txt").write_text(total + "\n")
    print(total)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
