"""What all commands share: help without waiting, mistakes in a line, three exit codes, tracebacks on demand."""

import errno
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from twinflow.cli import main
from twinflow.errors import ArgumentError, ArgumentTypeError

ROOT = Path(__file__).resolve().parents[2]
_TRAIN = "pip install 'twinflow[train]'"


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"twinflow {version('twinflow')}\n"


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ArgumentError("restore", "run", "a folder,\n now", 1), 2, "run must be a folder, now, got 1"),
        (ArgumentTypeError("export", "student", "a model", None), 2, "student must be a model, got None"),
        (ValueError("/a/b: steps are wrong"), 2, "/a/b: steps are wrong"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"), 2, "/a: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (FloatingPointError("loss must be finite, got nan"), 1, "loss must be finite, got nan"),
        (ModuleNotFoundError("x", name="peft.tuners"), 2, f"peft.tuners must be installed ({_TRAIN})"),
        (ModuleNotFoundError("x", name="torchao"), 2, "torchao must be installed (pip install 'twinflow[quant]')"),
        (ModuleNotFoundError("x", name="PIL"), 2, f"PIL must be installed ({_TRAIN})"),
        (ModuleNotFoundError("x", name="pyarrow"), 2, "pyarrow must be installed (pip install pyarrow)"),
        (ImportError("it needs another library"), 2, "it needs another library"),
        (KeyboardInterrupt(), 1, "stopped"),
    ],
)  # fmt: skip
def test_what_is_raised_becomes_a_line_and_a_status(error, status, message, capsys, monkeypatch):
    def run(options):
        raise error

    monkeypatch.setattr(import_module("twinflow.cli.export"), "run", run)
    assert main(["export", "somewhere"]) == status
    assert capsys.readouterr().err == f"twinflow export: {message}\n"
    for debugging in (["--debug", "export", "somewhere"], ["export", "somewhere", "--debug"]):
        assert main(debugging) == status
        shown = capsys.readouterr().err
        assert shown.startswith("Traceback") and f"{type(error).__name__}" in shown


@pytest.mark.parametrize(
    "error",
    [TypeError("x must be y"), KeyError("x"), ModuleNotFoundError("x", name="twinflow.nothing")],
)
def test_bugs_are_shown_whole(error, monkeypatch):
    def run(options):
        raise error

    monkeypatch.setattr(import_module("twinflow.cli.export"), "run", run)
    with pytest.raises(type(error)):
        main(["export", "somewhere"])


@pytest.mark.parametrize("work", ["[print('line') for _ in range(100_000)]", "time.sleep(0.5) or print('line')"])
def test_a_reader_that_goes_away_is_no_error(work):
    code = (
        "import sys, time\nfrom twinflow.cli import main\nfrom twinflow.cli import report\n"
        f"report.run = lambda options: {work} and 0 or 0\nsys.exit(main(['report', 'x']))"
    )
    script = '"$0" -c "$1" | true; echo "${PIPESTATUS[0]}"'
    command, buffered = ["bash", "-c", script, sys.executable, code], os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=buffered)
    assert done.stdout == "1\n" and done.stderr == ""
