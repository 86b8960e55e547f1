"""Every Triton kernel and CUDA file compiles for sm_80 and sm_90 without register spills; no GPU needed."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from twinflow_kernels import _backend

if _backend.interpreting():
    pytest.skip("kernels are interpreted in this suite, not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from helpers import aot, aot_calls

pytestmark = pytest.mark.aot
ROOT = Path(__file__).resolve().parents[2]
KERNELS = aot.kernels()
CAPABILITIES = [80, 90, pytest.param(100, marks=pytest.mark.slow)]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@cache
def launches() -> dict[str, list[aot.Launch]]:
    return aot.record(aot_calls.CALLS)


def test_every_kernel_is_reached():
    """A new kernel must be called in aot_calls.py."""
    missing = set(KERNELS) - aot.reached(set(launches()), KERNELS)
    assert missing == set(), "add a call to tests/helpers/aot_calls.py that launches these"


def test_launches_fix_the_compiler_option_that_changes_between_versions():
    """Fusing a product and a sum changes bits; Triton's default differs from 3.9 to 3.10, so launches say it."""
    silent = {launch.kernel for found in launches().values() for launch in found
              if dict(launch.options).get("enable_fp_fusion") is not False}  # fmt: skip
    assert silent == set(), "launch with enable_fp_fusion=False"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_triton_kernel(name, capability):
    for launch in launches().get(name, []):
        ptx = aot.compile_launch(launch, KERNELS[name], capability)
        assert aot.triton_spills(ptx, launch, capability) == 0, f"registers spill: {launch}"


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA files are not compiled ahead of time")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.name)
def test_cuda_file(source, capability, tmp_path):
    flags = re.search(r'^NVCC_FLAGS = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)[1].split()
    command = [NVCC, *flags, "-Xptxas", "-v", f"-arch=sm_{capability}", "-c", source, "-o", tmp_path / "object.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "__global__" in source.read_text():
        assert aot.spilled_bytes(done.stderr) == 0, done.stderr


def test_spills_are_seen():
    lines = [
        "0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads",
        "0 bytes spill stores, 0 bytes spill loads",
    ]
    assert aot.spilled_bytes("\n".join(lines)) == 12
