"""The benchmark's networks: a diffusion transformer in the shapes of known models, with random weights.

Image and text tokens run through shared blocks (attention with RMS-normalised queries and keys, GELU MLP, AdaLN from
two signed times); width, heads, depth and token counts are the named model's, so that time and memory per call are of
its kind. Diffusers' own classes come beside these in `MODELS` once the library has adapters for them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from twinflow_kernels import dual_time_embedding

FREQUENCIES = 256


@dataclass(frozen=True)
class Shape:
    """A network's size; latents are (channels, 128, 128), the latent of a 1024x1024 image."""

    channels: int
    patch: int
    dim: int
    heads: int
    depth: int
    text_tokens: int
    text_dim: int


MODELS = {
    "small": Shape(channels=16, patch=16, dim=128, heads=4, depth=2, text_tokens=16, text_dim=64),
    "sd3.5-medium": Shape(channels=16, patch=2, dim=1536, heads=24, depth=24, text_tokens=333, text_dim=4096),
    "sd3.5-large": Shape(channels=16, patch=2, dim=2432, heads=38, depth=38, text_tokens=333, text_dim=4096),
    "qwen-image-4-blocks": Shape(channels=16, patch=2, dim=3072, heads=24, depth=4, text_tokens=256, text_dim=3584),
}


class TimeMLP(nn.Module):
    """(B, 256) sinusoidal features -> (B, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FREQUENCIES, dim), nn.Linear(dim, dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.second(F.silu(self.first(features.to(self.first.weight.dtype))))


class Block(nn.Module):
    """One transformer block, modulated by the time embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        dim = shape.dim
        self.heads = shape.heads
        self.modulation = nn.Linear(dim, 6 * dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.q_norm, self.k_norm = (nn.RMSNorm(dim // shape.heads) for _ in range(2))

    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        batch, count, dim = tokens.shape
        modulation = self.modulation(F.silu(time)).unsqueeze(1).chunk(6, -1)  # 6 x (B, 1, D)
        h = F.layer_norm(tokens, (dim,)) * (1 + modulation[0]) + modulation[1]
        q, k, v = self.qkv(h).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, D/H)
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        tokens = tokens + modulation[2] * self.out(attended.transpose(1, 2).reshape(batch, count, dim))
        h = F.layer_norm(tokens, (dim,)) * (1 + modulation[3]) + modulation[4]
        return tokens + modulation[5] * self.down(F.gelu(self.up(h), approximate="tanh"))


class Transformer(nn.Module):
    """F(x_t, t, r, cond): latents (B, C, 128, 128), cond (B, text_tokens, text_dim)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        pixels, tokens = shape.channels * shape.patch**2, (128 // shape.patch) ** 2
        self.image_in, self.text_in = nn.Linear(pixels, shape.dim), nn.Linear(shape.text_dim, shape.dim)
        self.position = nn.Parameter(torch.randn(1, tokens, shape.dim) * 0.02)
        self.time_t, self.time_r = TimeMLP(shape.dim), TimeMLP(shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.image_out = nn.Linear(shape.dim, pixels)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        patch, dtype = self.shape.patch, self.image_in.weight.dtype
        time = dual_time_embedding(t, r, None, self.time_t, self.time_r, num_channels=FREQUENCIES, scale=1000.0)
        image = self.image_in(F.pixel_unshuffle(x_t.to(dtype), patch).flatten(2).transpose(1, 2)) + self.position
        tokens = torch.cat([self.text_in(cond.to(dtype)), image], 1)
        for block in self.blocks:
            tokens = block(tokens, time.to(dtype))
        image = self.image_out(tokens[:, self.shape.text_tokens :]).transpose(1, 2)
        return F.pixel_shuffle(image.unflatten(2, (128 // patch, -1)), patch)


def build(name: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A named network with seeded random weights."""
    torch.manual_seed(0)
    with device:
        return Transformer(MODELS[name]).to(dtype)


def random_batch(name: str, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Latents (B, C, 128, 128), cond (B, text, dim) and uncond (1, text, dim)."""
    shape = MODELS[name]
    latents = torch.randn(batch, shape.channels, 128, 128, device=device, dtype=dtype)
    cond = torch.randn(batch, shape.text_tokens, shape.text_dim, device=device, dtype=dtype)
    return latents, cond, torch.randn(1, shape.text_tokens, shape.text_dim, device=device, dtype=dtype)
