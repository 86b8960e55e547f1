"""`dual_time_embedding`: the whole conditioning against a plain restatement, and its contracts."""

import pytest
import torch
from helpers.kernel_checks import backends, sinusoids

from twinflow_kernels import _backend, combine_time_embeddings, dual_time_embedding

BACKENDS = backends(combine_time_embeddings._operation)
C, D = 10, 6


def embedders(dtype=torch.float64, device="cpu"):
    return [torch.nn.Sequential(torch.nn.Linear(C, 8), torch.nn.SiLU(), torch.nn.Linear(8, D)).to(device, dtype)
            for _ in range(2)]  # fmt: skip


def signed_times(dtype=torch.float64, device="cpu"):
    t = torch.tensor([0.9, -0.9, 0.3, -0.3, 0.0, -0.0], dtype=dtype, device=device)
    return t, t * torch.tensor([0.0, 0.5, 1.0, 1.0, 1.0, 1.0], dtype=dtype, device=device)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("with_r", [True, False])
@pytest.mark.parametrize("with_table", [True, False])
def test_equations_29_and_30(backend, device, with_table, with_r):
    """Output and gradients of every parameter, in float64, row by row."""
    (embed_t, embed_r), (t, r) = embedders(device=device), signed_times(device=device)
    table = torch.randn(2, D, dtype=torch.float64, device=device, requires_grad=True) if with_table else None
    leaves = [*embed_t.parameters(), *(embed_r.parameters() if with_r else ()), *([table] if with_table else ())]
    weight = torch.randn(len(t), D, dtype=torch.float64, device=device)

    expected = []
    for a, b in zip(t, r, strict=True):
        s, q = (a.abs(), b.abs()) if with_table else (a, b)
        row = embed_t(sinusoids(s[None], C, True, 0.0, 1000.0).to(device))[0]
        if with_r:
            row = row + embed_r(sinusoids(q[None], C, True, 0.0, 1000.0).to(device))[0] * (s - q)
        expected.append(row + table[1 if a < 0 else 0] if with_table else row)
    expected = torch.stack(expected)
    with _backend.override(backend):
        out = dual_time_embedding(t, r, table, embed_t, embed_r if with_r else None, num_channels=C, scale=1000.0)
        gradients = torch.autograd.grad((out * weight).sum(), leaves)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    for actual, exact in zip(gradients, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_dtype_follows_the_embedder(backend, device):
    """float32 times into bf16 embedders: the features are float32, the sum is rounded once, to bf16."""
    (t, r), seen = signed_times(torch.float32, device), []

    def embed(features):
        seen.append(features.dtype)
        return features[:, :D].to(torch.bfloat16)

    with _backend.override(backend):
        out = dual_time_embedding(t, r, None, embed, embed, num_channels=C, scale=1000.0)
    assert out.dtype == torch.bfloat16 and seen == [torch.float32] * 2


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_compiles_without_a_break(backend, device):
    (embed_t, embed_r), (t, r) = embedders(torch.float32, device), signed_times(torch.float32, device)
    table = torch.randn(2, D, device=device)

    def whole(t, r, table):
        return dual_time_embedding(t, r, table, embed_t, embed_r, num_channels=C)

    with _backend.override(backend):
        compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(t, r, table), whole(t, r, table))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(t=torch.ones(3, dtype=torch.bfloat16)), TypeError, "t must be float32, float64, got bfloat16"),
        (dict(t=torch.ones(3, dtype=torch.int64)), TypeError, "t must be float32, float64, got int64"),
        (dict(r=torch.ones(3, dtype=torch.float64)), TypeError, "r must be float32, got float64"),
        (dict(t=torch.ones(3, 1)), ValueError, r"t must be of shape \(B,\), got \(3, 1\)"),
        (dict(r=torch.ones(4)), ValueError, r"r must be of shape \(3,\), got \(4,\)"),
        (dict(t=torch.tensor([0.0, 1.5, 0.0])), ValueError, r"t must be within \[-1, 1\], got \[1.5\]"),
        (dict(r=torch.tensor([0.0, 0.0, float("nan")])), ValueError, r"r must be within \[-1, 1\], got \[nan\]"),
        (dict(t=torch.ones(3, requires_grad=True)), ValueError, "t must be a tensor without requires_grad"),
        (dict(sign_table=torch.ones(3, D)), ValueError, r"sign_table must be of shape \(2, D\), got \(3, 6\)"),
        (dict(sign_table=torch.ones(2, 5)), ValueError, r"sign_table must be of shape \(2, 6\), got \(2, 5\)"),
        (dict(sign_table=torch.ones(2, D, dtype=torch.int32)), TypeError, "sign_table must be"),
        (dict(num_channels=1), ValueError, "num_channels must be at least 2, got 1"),
        (dict(num_channels=4.0), TypeError, "num_channels must be an int, got float"),
        (dict(downscale_freq_shift=5.0), ValueError, "downscale_freq_shift must be less than num_channels // 2 = 5"),
        (dict(embed_t=lambda f: f[:2]), ValueError, r"embed_t's output must be of shape \(3, D\), got \(2, 10\)"),
        (dict(embed_r=lambda f: f), ValueError, r"embed_r's output must be of embed_t's output's shape \(3, 6\)"),
        (dict(embed_t=lambda f: None), TypeError, "embed_t's output must be a tensor, got NoneType"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(t=torch.ones(3), r=torch.zeros(3), sign_table=None, embed_t=lambda f: f[:, :D],
                     embed_r=lambda f: f[:, :D], num_channels=C) | change  # fmt: skip
    with pytest.raises(error, match=f"dual_time_embedding: {message}"):
        dual_time_embedding(**arguments)
