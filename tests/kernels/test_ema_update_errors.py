"""`ema_update_`: bad input is refused by name and nothing is modified, by the compiled table and by Python's."""

import pytest
import torch

from twinflow_kernels import _backend, ema_update_
from twinflow_kernels import ema_update as kernel

NAN = float("nan")


@pytest.fixture(params=["compiled", "python"])
def tables(request, monkeypatch):
    """The two ways to the table of tensors; the second serves installs without native code and torch < 2.10."""
    if request.param == "python":
        monkeypatch.setattr(kernel, "_reader", lambda: None)
    elif _backend.native() is None:
        pytest.skip("no compiled module")


def test_both_tables_are_equal():
    if _backend.native() is None:
        pytest.skip("no compiled module")
    targets = [torch.randn(3, 1, 4), torch.randn(0, 2).double(), torch.randn(7, 9)[2:5].bfloat16(), torch.ones(())]
    sources = [torch.nn.Parameter(x.detach().half()) for x in targets]
    copies = [torch.empty_like(x, dtype=torch.bfloat16) for x in targets[:2]]
    fast = kernel.np.empty(len(targets), kernel.PAIR)
    assert kernel._reader().ema_pairs(targets, sources, copies, fast.ctypes.data)
    slow = kernel._python_table(targets, sources, copies)
    for field in kernel.PAIR.names:
        keep = slow["count"] > 0  # an empty tensor has no address to speak of
        assert (fast[field][keep] == slow[field][keep]).all(), field
    assert (fast["count"] == slow["count"]).all()


def test_no_tensors():
    assert ema_update_([], [], 0.9) is None
    assert ema_update_([], [], 0.9, []) is None


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(targets=[torch.ones(4).long(), torch.ones(5)]), TypeError, r"targets\[0\] must be float32.*got int64"),
        (dict(sources=[torch.ones(4), torch.ones(5).cfloat()]), TypeError, r"sources\[1\] must be .*got complex64"),
        (dict(targets=[torch.ones(4), None]), TypeError, r"targets\[1\] must be a tensor, got NoneType"),
        (dict(sources=[torch.ones(4), None]), TypeError, r"sources\[1\] must be a tensor, got NoneType"),
        (dict(copies=[None, torch.ones(5).int()]), TypeError, r"copies\[1\] must be .*got int32"),
        (dict(decay="0.9"), TypeError, "decay must be a number or a tensor of one element, got str"),
        (dict(decay=True), TypeError, "decay must be a number or a tensor of one element, got bool"),
        (dict(decay=torch.tensor(1)), TypeError, "decay must be float32.*got int64"),
        (dict(decay=torch.ones(2)), ValueError, r"decay must be a tensor of one element, got shape \(2,\)"),
        (dict(decay=1.01), ValueError, r"decay must be in \[0, 1\], got 1.01"),
        (dict(decay=-1e-9), ValueError, r"decay must be in \[0, 1\], got -1e-09"),
        (dict(decay=NAN), ValueError, r"decay must be in \[0, 1\], got nan"),
        (dict(decay=torch.tensor(1.5)), ValueError, r"decay must be in \[0, 1\], got 1.5"),
        (dict(decay=torch.tensor(NAN)), ValueError, r"decay must be in \[0, 1\], got nan"),
        (dict(decay=torch.ones((), device="meta")), ValueError, "decay must be on the CPU or .* got meta"),
        (dict(sources=[torch.ones(4)]), ValueError, "sources must be as long as targets, 2, got 1"),
        (dict(copies=[None]), ValueError, "copies must be as long as targets, 2, got 1"),
        (
            dict(sources=[torch.ones(4), torch.ones(1)]),
            ValueError,
            r"sources\[1\] must be of targets\[1\]'s shape \(5,\)",
        ),
        (dict(copies=[None, torch.ones(5, 1)]), ValueError, r"copies\[1\] must be of targets\[1\]'s shape \(5,\)"),
        (dict(targets=[torch.ones(4), torch.ones(5, device="meta")]), ValueError, r"targets\[1\] must be on .*cpu"),
        (dict(sources=[torch.ones(4), torch.ones(5, device="meta")]), ValueError, r"sources\[1\] must be on .*cpu"),
        (dict(copies=[None, torch.ones(5, device="meta")]), ValueError, r"copies\[1\] must be on .*cpu"),
        (dict(sources=[torch.ones(4), torch.ones(5).to_sparse()]), ValueError, r"sources\[1\] must be dense"),
        (dict(targets=[torch.ones(4), torch.ones(10)[::2]]), ValueError, r"targets\[1\] must be contiguous"),
        (dict(copies=[None, torch.ones(10)[::2]]), ValueError, r"copies\[1\] must be contiguous"),
        (dict(targets=[torch.ones(4), torch.ones(5, requires_grad=True)]), ValueError, r"targets\[1\] .*requires_grad"),
        (dict(copies=[torch.ones(4, requires_grad=True), None]), ValueError, r"copies\[0\] .*requires_grad"),
    ],
)
def test_bad_input(change, error, message, tables):
    sources = [torch.zeros(4), torch.zeros(5)]
    arguments = dict(targets=[torch.ones(4), torch.ones(5)], sources=sources, decay=0.9, copies=None) | change
    watched = [
        x for x in arguments["targets"] + (arguments["copies"] or []) if x is not None and x.device.type == "cpu"
    ]
    before = [x.detach().clone() for x in watched]
    with pytest.raises(error, match=f"^ema_update_: {message}"):
        ema_update_(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(watched, before, strict=True))


def test_overlaps_are_refused(tables):
    base, other = torch.ones(20), torch.zeros(20)
    for targets, sources, copies in (
        ([base], [base], None),
        ([base[:10]], [base[9:19]], None),
        ([base[:10], base[5:15]], [other[:10], other[:10]], None),
        ([base[5:10], base[:20]], [other[:5], other], None),
        ([base], [other], [base]),
        ([base], [other], [other]),
        ([base[:4]], [base[1::5]], None),
    ):
        with pytest.raises(ValueError, match="targets and copies must be memory of their own"):
            ema_update_(targets, sources, 0.5, copies)
    assert torch.equal(base, torch.ones(20)) and torch.equal(other, torch.zeros(20))
    # Neighbours in one storage, a source used twice, and empty slices inside another tensor are no overlap.
    ema_update_([base[:10], base[10:], base[3:3]], [other[:10], other[:10], base[5:5]], 0.5)
    assert torch.equal(base, torch.full((20,), 0.5))
