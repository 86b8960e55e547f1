"""`dual_time_embedding` around given embeddings, forward and backward, against the eager chain and torch.compile of it.

The embedders (two small matrix products) are left out: they are the same for everyone and would hide the rest.
"""

import math

import torch
from harness import Case, main

from twinflow_kernels import dual_time_embedding

CHANNELS, WIDTH = 256, 3072


def timesteps(time):
    """diffusers' `Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)`, in float32."""
    half = CHANNELS // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=time.device) / half
    angle = 1000 * (time[:, None].float() * torch.exp(exponent)[None])
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def eager(inputs):
    t, r, emb_t, emb_r, table, dout = inputs
    first, second = timesteps(t.abs()), timesteps(r.abs())
    difference = (t.abs() - r.abs())[:, None]
    out = (emb_t.float() + emb_r.float() * difference + table[(t < 0).long()]).to(emb_t.dtype)
    return out, *torch.autograd.grad(out, (emb_t, emb_r, table), dout), first, second


def fused(inputs):
    t, r, emb_t, emb_r, table, dout = inputs
    features = []

    def embedder(embedding):
        return lambda f: features.append(f) or embedding

    out = dual_time_embedding(t, r, table, embedder(emb_t), embedder(emb_r), num_channels=CHANNELS, scale=1000.0)
    return out, *torch.autograd.grad(out, (emb_t, emb_r, table), dout), *features


def case(rows, dtype, device):
    def make_inputs(i):
        t = torch.rand(rows, device=device)
        t[::4] *= -1
        emb_t, emb_r, dout = (torch.randn(rows, WIDTH, device=device).to(dtype) for _ in range(3))
        table = torch.randn(2, WIDTH, device=device)
        return t, t * 0.5, emb_t.requires_grad_(), emb_r.requires_grad_(), table.requires_grad_(), dout

    return Case(
        name=f"({rows}, {WIDTH}) {str(dtype).removeprefix('torch.')}",
        make_inputs=make_inputs,
        run=fused,
        reference=eager,
        bytes_moved=5 * rows * WIDTH * dtype.itemsize + 3 * 2 * WIDTH * 4 + 8 * rows * CHANNELS,
        peers={"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)},
        atol=2e-2 if dtype == torch.bfloat16 else 2e-4,  # the float32 chain's angles are 1e-4 off
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
    )


def cases(device):
    return [case(rows, dtype, device) for rows in (4, 24) for dtype in (torch.float32, torch.bfloat16)]


if __name__ == "__main__":
    main(cases, "dual_time_embedding")
