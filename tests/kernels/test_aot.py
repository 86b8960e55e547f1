"""Every Triton kernel and CUDA file compiles for sm_80 and sm_90, and what the machine code says; no GPU needed."""

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from twinflow_kernels import _backend, ema_update_

if _backend.interpreting():
    pytest.skip("kernels are interpreted in this suite, not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

import aot
import aot_calls
import compiled_kernels
import machine_code

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
    assert missing == set(), "add a call to benchmarks/aot_calls.py that launches these"


def test_launches_fix_the_compiler_option_that_changes_between_versions():
    """Fusing a product and a sum changes bits; Triton's default differs from 3.9 to 3.10, so launches say it."""
    silent = {launch.kernel for found in launches().values() for launch in found
              if dict(launch.options).get("enable_fp_fusion") is not False}  # fmt: skip
    assert silent == set(), "launch with enable_fp_fusion=False"


# Kernel -> loads and stores under 16 bytes that an aligned variant may have, and why.
NARROW = {
    "_rollout_start_kernel": (2, 0, "ratio and delta, a number a row"),
    "_rollout_step_kernel": (1, 0, "dt, a number a row"),
    "_residual_kernel": (4, 1, "four coefficients a row, and the sum of a block"),
    "_gradient_kernel": (2, 0, "grad_loss and factor, a number a row"),
}
STACK = {"_time_features_kernel": "the float64 sine reduces large angles through a table on the stack"}
OCCUPANCY = 0.25  # of an SM's threads: with 16 bytes of each in flight it is 8 KB, what a memory's latency takes


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_resources_of_a_triton_kernel(name):
    """On sm_80; of sm_90 the whole code is read, of sm_80 among the slow."""
    for launch in launches().get(name, []):
        (code,) = machine_code.read(aot.compile_launch(launch, KERNELS[name], 80), listing=False).values()
        assert code.stack == 0 or name in STACK, f"{code.stack} bytes of stack: {launch}"
        assert code.occupancy(launch.threads, 80) >= OCCUPANCY, f"{code.registers} registers: {launch}"


@pytest.mark.parametrize("capability", [90, *(pytest.param(number, marks=pytest.mark.slow) for number in (80, 100))])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_triton_kernel(name, capability):
    for launch in launches().get(name, []):
        (code,) = machine_code.read(aot.compile_launch(launch, KERNELS[name], capability)).values()
        assert (code.loads and code.stores) or code.loop, f"no access of memory found: {launch}"
        assert code.stack == 0 or name in STACK, f"{code.stack} bytes of stack: {launch}"
        assert code.occupancy(launch.threads, capability) >= OCCUPANCY, f"{code.registers} registers: {launch}"
        if launch.whole_accesses:
            loads, stores, _ = NARROW.get(name, (0, 0, ""))
            narrow = [sum(n for width, n in found.items() if width < 16) for found in (code.loads, code.stores)]
            assert narrow[0] <= loads and narrow[1] <= stores, f"loads {code.loads}, stores {code.stores}: {launch}"


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA files are not compiled ahead of time")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.name)
def test_cuda_file(source, capability, tmp_path):
    flags = re.search(r'^NVCC_FLAGS = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)[1].split()
    command = [NVCC, *flags, f"-arch=sm_{capability}", "-c", source, "-o", tmp_path / "object.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, code in machine_code.read((tmp_path / "object.o").read_bytes()).items():
        assert code.stack == 0, name
        assert code.occupancy(256, capability) >= OCCUPANCY, f"{name}: {code.registers} registers"
        assert code.loads[16] and code.stores[16], f"{name}: loads {code.loads}, stores {code.stores}"


def test_the_committed_table_is_of_these_kernels():
    cells = json.loads(compiled_kernels.RESULT.read_text())["cells"]
    assert [(cell["kernel"], cell["dtypes"]) for cell in cells] == [
        (launch.kernel, compiled_kernels.dtypes(launch)) for launch in compiled_kernels.shown(launches())
    ]
    assert all(0 < cell["share_80"] <= 1 and 0 < cell["share_90"] <= 1 for cell in cells)


def test_what_a_listing_says():
    """A loop over global memory, an exchange in it, and what stands outside."""
    text = """k
        /*0000*/                   LDG.E.U16 R1, [R2.64] ;
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   STS.128 [R3], R4 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   STG.E.64 [R2.64], R4 ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70 ;
        /*0080*/                   NOP;
"""
    code = machine_code.read_function(text, machine_code.Code(48, 0, 4096))
    assert code.loop and code.instructions == 5 and code.exchanges == {"STS": 1, "BAR": 1}
    assert code.loads == {16: 1} and code.stores == {8: 1}
    assert code.occupancy(256, 90) == 1280 / 2048 and code.occupancy(64, 90) == 1344 / 2048  # 42 warps' registers
    straight = machine_code.read_function(text.replace("BRA 0x10", "BRA 0x60"), machine_code.Code(48, 0, 0))
    assert not straight.loop and straight.instructions == 8 and straight.loads == {2: 1, 16: 1}


def test_one_odd_address_does_not_slow_the_others():
    def update():
        base = torch.ones(1001)
        ema_update_([torch.ones(1000), base[1:], torch.ones(1000)], [torch.ones(1000) for _ in range(3)], 0.5)

    found = aot.record([update])["_ema_update_kernel"]
    assert sorted(dict(launch.constants)["ALIGNED"] for launch in found) == [False, True]
