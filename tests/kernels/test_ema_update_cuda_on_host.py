"""The source of `ema_update_`'s CUDA kernel, compiled for the host: the reference's bits and the number of launches."""

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from twinflow_kernels._registry import DTYPE_CODES
from twinflow_kernels.ema_update import ema_update_ref, prepare

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """(targets, sources, decay, copies, decay_tensor) -> number of launches."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("ema") / "ema.so"
    flags = (
        "-std=c++17 -O1 -ffp-contract=off -fno-strict-aliasing -fsanitize=undefined -fno-sanitize-recover -shared -fPIC"
    )
    source = HERE / "cuda_on_host" / "ema_update.cpp"
    subprocess.run(
        [compiler, *flags.split(), f"-I{source.parent}", f"-I{CSRC}", str(source), "-o", library], check=True
    )
    function = ctypes.CDLL(str(library)).ema_update_on_host
    function.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_double, ctypes.c_int64, ctypes.c_int]

    def run(targets, sources, decay, copies=(), decay_tensor=None):
        table, kept = prepare(targets, sources, list(copies))
        pointer = (0, 0) if decay_tensor is None else (decay_tensor.data_ptr(), DTYPE_CODES[decay_tensor.dtype])
        launches = function(table.ctypes.data, len(table), decay, *pointer)
        del kept
        return launches

    return run


def assert_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("on_device", [None, torch.float64, torch.float32])
def test_every_dtype_tail_and_alignment(launch, decay, on_device):
    targets, sources, copies = [], [], []
    sizes = ((0, 0), (1, 0), (17, 0), (17, 1), (1025, 0), (16384, 3), (16385, 0))
    for dtypes, (size, offset) in itertools.product(itertools.product(DTYPE_CODES, repeat=3), sizes):
        for tensors, dtype in zip((targets, sources, copies), dtypes, strict=True):
            tensors.append(torch.randn(size + offset).to(dtype)[offset:])
    decay_tensor = None if on_device is None else torch.tensor([decay], dtype=on_device)
    value = decay if decay_tensor is None else decay_tensor.item()
    expected = [ema_update_ref(t, s, value) for t, s in zip(targets, sources, strict=True)]
    half = len(targets) // 2
    before = [x.clone() for x in copies[half:]]
    assert launch(targets, sources, decay if on_device is None else 0.123, copies[:half], decay_tensor) == 1
    assert_bits(targets, expected)
    assert_bits(copies[:half], [x.to(c.dtype) for x, c in zip(expected, copies[:half], strict=False)])
    assert_bits(copies[half:], before)


@pytest.mark.parametrize("with_copies, launches", [(False, 2), (True, 2)])
def test_two_thousand_tensors_in_two_launches(launch, with_copies, launches):
    targets, sources, copies = ([torch.randn(i % 50) for i in range(2000)] for _ in range(3))
    expected = [ema_update_ref(t, s, 0.9) for t, s in zip(targets, sources, strict=True)]
    assert launch(targets, sources, 0.9, copies if with_copies else []) == launches
    assert_bits(targets, expected)
    if with_copies:
        assert_bits(copies, expected)


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_a_decay_out_of_range_on_the_device_gives_nan(launch, decay):
    targets = [torch.ones(20)]
    launch(targets, [torch.ones(20)], 0.0, decay_tensor=torch.tensor(decay))
    assert targets[0].isnan().all()
