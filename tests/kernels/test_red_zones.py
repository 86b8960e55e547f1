"""Accesses of interpreted kernels are watched: a wrong one fails with the kernel's name."""

import pytest
import torch

from twinflow_kernels import _backend
from twinflow_kernels._triton import tl, triton

pytestmark = pytest.mark.skipif(
    not _backend.interpreting(), reason="kernels are compiled in this suite, not interpreted"
)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, read, write, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns, mask=columns < read, other=0.0)
    tl.store(y_ptr + columns, x, mask=columns < write)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_wrong_access_is_told(dtype):
    room, out = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    x, y = room[:5], out[:5]  # its memory goes on: nothing else would notice
    _copy_kernel[(1,)](x, y, 5, 5, BLOCK=8)
    for read, write, message in ((6, 5, "reads 1 elements"), (5, 7, "writes 2 elements")):
        with pytest.raises(pytest.fail.Exception, match=f"_copy_kernel {message} outside of its tensors"):
            _copy_kernel[(1,)](x, y, read, write, BLOCK=8)
    assert out.tolist() == [1] * 5 + [0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_was_never_written_is_not_read(dtype):
    empty, given = torch.empty(8, dtype=dtype), torch.full((8,), torch.nan, dtype=dtype)
    _copy_kernel[(1,)](given, torch.ones_like(given), 8, 8, BLOCK=8)  # a NaN that was given is data
    for x in (empty, given.new_empty(8), torch.empty_like(given)):
        with pytest.raises(pytest.fail.Exception, match="_copy_kernel reads what was never written"):
            _copy_kernel[(1,)](x, given, 8, 8, BLOCK=8)
