"""What all commands share: help without waiting, mistakes in a line, three exit codes, tracebacks on demand."""

import errno
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from twinflow.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("torch", "diffusers", "transformers", "matplotlib", "rich", "PIL")
_TRAIN = "pip install 'twinflow[train]'"
LIGHT = [name for name in COMMANDS if name != "train"]  # whose options are checked against the settings' own tables


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in LIGHT)])
def test_help_imports_nothing_slow(arguments):
    code = (
        "import sys\nfrom twinflow.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        f"    sys.exit(' '.join(name for name in {SLOW} if name in sys.modules) or end.code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.strip() == f"twinflow {version('twinflow')}" or done.stdout.startswith("usage: twinflow")


def test_every_command_is_listed_with_what_it_is_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as shown:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert shown.value.code == 0
    for name, purpose in COMMANDS.items():
        assert f"{name} {purpose[:20]}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_a_narrow_terminal(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as shown:
        main([name, "--help"])
    lines = capsys.readouterr().out.split("\n")
    assert shown.value.code == 0 and max(map(len, lines)) <= 80
    text = " ".join("\n".join(lines).split())
    assert "--debug" in text and "(default: None)" not in text and "(default: [])" not in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "twinflow: the following arguments are required: COMMAND; `twinflow --help` shows all"),
        (["plam"], "twinflow: there is no command 'plam'; did you mean 'plan'?"),
        (["zzz"], "twinflow: there is no command 'zzz'; `twinflow --help` shows all"),
        (["sample", "x", "--promt", "y"], "twinflow sample: there is no option '--promt'; did you mean '--prompt'?"),
        (["export", "x", "--form", "y"], "twinflow export: there is no option '--form'; did you mean '--format'?"),
        (["export", "x", "y"], "twinflow export: there is no place for 'y'; `twinflow export --help` shows all"),
        (["sample", "x", "--steps", "two"], "twinflow sample: argument --steps: invalid int value: 'two'; "),
        (["export", "x", "--ema", "--student"], "twinflow export: argument --student: not allowed with argument --ema"),
    ],
)
def test_mistakes_of_spelling_end_with_a_line_and_status_two(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert ended.value.code == 2 and line.startswith(message)


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ValueError("export: run must be a folder,\n got nothing"), 2, "run must be a folder, got nothing"),
        (ValueError("restored: run must be a folder, got 1"), 2, "run must be a folder, got 1"),
        (ValueError("/a/b: steps are wrong"), 2, "/a/b: steps are wrong"),
        (TypeError("export: student must be a model, got None"), 2, "student must be a model, got None"),
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
    [TypeError("'int' object is not iterable"), KeyError("x"), ModuleNotFoundError("x", name="twinflow.nothing")],
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
