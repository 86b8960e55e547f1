"""Which backend serves a device, and why, on machines that are not at hand."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from twinflow_kernels import _backend, _registry, _triton

ALL = frozenset({"cuda", "triton", "reference"})


@pytest.fixture
def machine(monkeypatch):
    """Pretends to be a machine with a GPU; the answers that were cached are forgotten before and after."""

    def pretend(has_cuda=True, runtime=12080, driver=12080, capability=(9, 0)):
        module = SimpleNamespace(has_cuda=has_cuda, cuda_versions=lambda: (runtime, driver))
        monkeypatch.setattr(_backend, "native", lambda: module)
        monkeypatch.setattr(_triton, "MISSING", None)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.delenv("TWINFLOW_BACKEND", raising=False)
        return _backend.choose("op", ALL, "cuda")

    forget = (_backend.cuda_missing, _backend._choose)
    for function in forget:
        function.cache_clear()
    yield pretend
    for function in forget:
        function.cache_clear()


def test_cuda_first(machine):
    assert machine() == _backend.Choice("cuda", "compiled CUDA C++")


@pytest.mark.parametrize("changed, why", [
    (dict(has_cuda=False), "built without nvcc"),
    (dict(runtime=13000, driver=12080), "the driver serves CUDA 12.8, the kernels need 13.0"),
    (dict(driver=12000), "the driver serves CUDA 12.0, the kernels need 12.1"),
    (dict(driver=0), "the driver serves CUDA 0.0, the kernels need 12.1"),
    (dict(capability=(7, 5)), "the kernels are compiled for compute capability 8.0 and later"),
], ids=str)  # fmt: skip
def test_triton_where_cuda_cannot_serve(machine, changed, why):
    assert machine(**changed) == _backend.Choice("triton", f"Triton (CUDA C++: {why})")


@pytest.mark.parametrize("runtime, driver", [(12080, 12010), (12000, 12000), (13020, 13000), (11080, 11040)])
def test_an_older_driver_of_the_same_major_version(machine, runtime, driver):
    assert machine(runtime=runtime, driver=driver).backend == "cuda"


@pytest.mark.parametrize("operation", _registry.operations(), ids=lambda operation: operation.name)
def test_the_first_argument_says_on_which_device_to_launch(operation):
    first = getattr(torch.ops.twinflow, operation.name).default._schema.arguments[0]
    assert str(first.type) in ("Tensor", "List[Tensor]")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import twinflow
from twinflow_kernels import _backend, rollout_start
x, row = torch.ones(2, 3), torch.ones(2)
print([y.tolist() for y in rollout_start(x, x, None, None, row, row)])
print(_backend._usable("triton", frozenset({"triton"}), "cuda"))
"""


def test_without_triton_the_others_serve():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values, why = done.stdout.splitlines()
    assert values == f"{[[[1.0] * 3] * 2, [[0.0] * 3] * 2]}"
    assert why.startswith("triton does not import: ")
