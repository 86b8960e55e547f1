"""`combine_time_embeddings`: every backend against the reference in float64, its gradient against autograd."""

import pytest
import torch
from helpers.kernel_checks import DTYPES, assert_accurate, backends, strided

from twinflow_kernels import _backend
from twinflow_kernels import combine_time_embeddings as kernel

BACKENDS = backends(kernel._operation)
OP = torch.ops.twinflow.combine_time_embeddings
TERMS = [(True, True), (True, False), (False, True)]


def inputs(rows=5, width=70, dtype=torch.float32, table_dtype=torch.float32, terms=(True, True), device="cpu"):
    emb_t, emb_r = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    table = torch.randn(2, width, device=device).to(table_dtype)
    time_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    t = 2 * torch.rand(rows, device=device, dtype=time_dtype) - 1
    t[: rows // 3] *= -1
    has_r, has_table = terms
    return emb_t, emb_r if has_r else None, t, t * 0.7 if has_r else None, table if has_table else None


def double(arguments):
    return [x if x is None else x.double() for x in arguments]


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 513, 1030])
def test_accuracy(backend, device, width, dtype, terms):
    arguments = inputs(5, width, dtype, torch.bfloat16, terms, device)
    with _backend.override(backend):
        out = OP(*arguments)
    exact = kernel.combine_time_embeddings_ref(*double(arguments))
    assert_accurate(out, exact, kernel.combine_time_embeddings_ref(*arguments), backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows, width", [(1, 65), (7, 513)])
def test_gradient_accuracy(backend, device, rows, width, dtype, terms):
    """Against autograd of the reference in float64, emb_t's gradient bit for bit."""
    arguments = inputs(rows, width, dtype, torch.float32, terms, device)
    dout = torch.randn(rows, width, device=device).to(dtype)

    def gradients(function, values, dout):
        leaves = [None if x is None else x.detach().clone() for x in values]
        wanted = [x for i, x in enumerate(leaves) if x is not None and i in (0, 1, 4)]
        for x in wanted:
            x.requires_grad_()
        return torch.autograd.grad(function(*leaves), wanted, dout)

    with _backend.override(backend):
        actual = gradients(OP, arguments, dout)
        again = gradients(OP, arguments, dout)
    exact = gradients(kernel.combine_time_embeddings_ref, double(arguments), dout.double())
    reference = gradients(kernel.combine_time_embeddings_ref, arguments, dout)
    assert torch.equal(actual[0], dout)
    for a, b, e, ref in zip(actual, again, exact, reference, strict=True):
        assert torch.equal(a, b)
        assert_accurate(a, e, ref, backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_gradcheck(backend, device):
    emb_t, emb_r, t, r, table = inputs(4, 3, torch.float64, torch.float64, device=device)
    leaves = [x.requires_grad_() for x in (emb_t, emb_r, table)]
    with _backend.override(backend):
        assert torch.autograd.gradcheck(lambda a, b, c: OP(a, b, t, r, c), leaves)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("which", [(0,), (1,), (4,), (0, 4), (1, 4)])
def test_only_what_is_asked_for(backend, device, which):
    """Every subset of the gradients equals its part of the full set."""
    everything, arguments = inputs(4, 33, device=device), None
    with _backend.override(backend):
        for indices in ((0, 1, 4), which):
            arguments = [x.detach().clone() for x in everything]
            OP(*(x.requires_grad_() if i in indices else x for i, x in enumerate(arguments))).square().sum().backward()
            if indices == (0, 1, 4):
                full = [x.grad for x in arguments]
    for i, x in enumerate(arguments):
        assert torch.equal(x.grad, full[i]) if i in which else x.grad is None


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_strides_rows_and_empty(backend, device):
    emb_t, emb_r, t, r, table = inputs(6, 40, device=device)
    dout = torch.randn(6, 40, device=device)
    backward = torch.ops.twinflow.combine_time_embeddings_backward
    with _backend.override(backend):
        out = OP(emb_t, emb_r, t, r, table)
        assert torch.equal(out, OP(strided(emb_t), strided(emb_r), strided(t), strided(r), strided(table)))
        assert torch.equal(out, torch.cat([OP(emb_t[i : i + 1], emb_r[i : i + 1], t[i : i + 1], r[i : i + 1], table)
                                           for i in range(6)]))  # fmt: skip
        demb_r, dtable = backward(dout, t, r, True, torch.float32, torch.float32)
        alone = backward(strided(dout), strided(t), strided(r), True, torch.float32, None)[0]
        assert torch.equal(demb_r, alone)
        assert OP(emb_t[:0], emb_r[:0], t[:0], r[:0], table).shape == (0, 40)
        assert torch.equal(backward(dout[:0], t[:0], r[:0], True, None, torch.float32)[1], torch.zeros_like(dtable))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_table_gradient_has_the_reference_bits(backend, device):
    """The sum runs row after row everywhere, so not even its rounding depends on the backend."""
    t, dout = 2 * torch.rand(50, device=device) - 1, torch.randn(50, 130, device=device)
    arguments = (dout, t, None, True, None, torch.float32)
    with _backend.override(backend):
        dtable = torch.ops.twinflow.combine_time_embeddings_backward(*arguments)[1]
    assert torch.equal(dtable, kernel.combine_time_embeddings_backward_ref(*arguments)[1])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_exact_zero_at_equal_times(backend, device):
    """Property: at r = t the second embedder has no effect, however large; its gradient is zero there."""
    emb_t, emb_r, t, _, table = inputs(6, 65, device=device)
    emb_r = (emb_r * 1e37).requires_grad_()
    with _backend.override(backend):
        for sign_table in (None, torch.zeros_like(table)):
            out = OP(emb_t, emb_r, t, t.clone(), sign_table)
            assert torch.equal(out, emb_t)
            assert torch.autograd.grad(out.sum(), emb_r)[0].abs().max() == 0


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_sign_of_zero_is_positive_and_the_other_row_is_not_read(backend, device):
    emb_t = torch.zeros(4, 65, device=device)
    t = torch.tensor([0.0, -0.0, -1e-30, 1.0], device=device)
    table = torch.tensor([[1.0], [2.0]], device=device).expand(2, 65).clone()
    with _backend.override(backend):
        assert OP(emb_t, None, t, None, table)[:, 0].tolist() == [1, 1, 2, 1]
        table[1] = float("nan")
        assert OP(emb_t, None, t, None, table)[:, 64].isnan().tolist() == [False, False, True, False]
        dout = torch.ones(4, 65, device=device)
        dout[2] = float("nan")
        dtable = torch.ops.twinflow.combine_time_embeddings_backward(dout, t, None, True, None, torch.float32)[1]
    assert (dtable[0] == 3).all() and dtable[1].isnan().all()


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("terms", TERMS)
def test_opcheck_and_compile(backend, device, terms):
    arguments = [
        x.requires_grad_() if x is not None and x.dim() == 2 else x for x in inputs(3, 65, terms=terms, device=device)
    ]
    with _backend.override(backend):
        torch.library.opcheck(OP, arguments)
        compiled = torch.compile(lambda *a: OP(*a), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments), OP(*arguments))


def test_launch_config_covers_the_row():
    for width in (1, 64, 65, 512, 3072, 1 << 20):
        block, num_warps = kernel.launch_config(width)
        assert block & (block - 1) == 0 and 64 <= block <= 512 and num_warps in (1, 2, 4)
