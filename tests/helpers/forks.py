"""Programs in a fork of this process, which has imported torch and diffusers already."""

import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Ended:
    """What a child left.

    Args:
        status: the exit status, negative where a signal ended it.
        out: what it wrote to standard output.
        err: what it wrote to standard error.
    """

    status: int
    out: str
    err: str


def run_in_fork(work: Callable[[], object], cwd: Path | None = None) -> Ended:
    """Runs `work` in a child; it may raise SystemExit, as a program does."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _be_a_process(work, cwd, out.fileno(), err.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    return Ended(status, *texts)


def run_script(script: Path, *arguments: str, cwd: Path | None = None) -> Ended:
    """`python script arguments...` in a fork."""

    def work() -> None:
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")

    return run_in_fork(work, cwd)


def _be_a_process(work: Callable[[], object], cwd: Path | None, out: int, err: int) -> None:
    status = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        # pytest's own capture has put other files in their places
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
        os.chdir(cwd or os.getcwd())
        torch.set_num_threads(1)  # threads do not come along into a fork
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
