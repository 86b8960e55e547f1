"""Real launchers: what they ask for is what `wrap` gives."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.launched_run import step
from helpers.tiny_pipelines import saved_pipeline

from twinflow.train.checkpoint.checkpoint import latest_checkpoint, read_checkpoint

BIN = Path(sys.executable).parent
# kind -> (launcher and its options, the option of its port, class of what is called)
LAUNCHERS = {
    "fsdp2": ([BIN / "accelerate", "launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"],
              "--main_process_port", "FSDPSD3Model"),
    "ddp": ([BIN / "torchrun", "--nproc-per-node", "2"], "--master-port", "DistributedDataParallel"),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("one")
    step(saved_pipeline("sd3"), folder)
    return read_checkpoint(latest_checkpoint(folder))


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_launcher(kind, expected, tmp_path):
    """Two processes take the step of one, and agree on a flag that one of them raises."""
    command, port, called = LAUNCHERS[kind]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = [port, str(found.getsockname()[1])]
    script = Path(__file__).resolve().parents[1] / "helpers" / "launched_run.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [*command, *port, script, saved_pipeline("sd3"), tmp_path]
    launcher = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, said = launcher.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)  # with its children
        pytest.fail("the ranks wait for each other")
    assert launcher.returncode == 0, said.decode()[-3000:]
    tree = read_checkpoint(latest_checkpoint(tmp_path))
    for piece in tree["ranks"]:
        assert piece["extra"]["agreed"] == [False, True, False] and piece["extra"]["class"] == called
        assert piece["extra"]["norm"] == pytest.approx(expected["ranks"][0]["extra"]["norm"], rel=1e-4)
    for name, value in expected["shared"]["student"].items():
        torch.testing.assert_close(tree["shared"]["student"][name], value, rtol=1e-4, atol=2e-6)
