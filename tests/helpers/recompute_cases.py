"""A small network of blocks whose kept bytes and repeated operations are sums by hand, and how to count them."""

from collections import Counter

import torch
import torch.nn.functional as F
from helpers.batches import gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROWS, TOKENS, WIDTH, HEADS, RANK = 3, 5, 8, 2, 2
MIXED = ("products", "input", "attention")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
# Operations of one block that run a second time: the base's products, the two adapters', attention.
AGAIN = {"input": (4, 4, 1), "attention": (4, 4, 0), "products": (0, 4, 0), "all": (0, 0, 0)}


class Adapter(nn.Module):
    """A linear layer with a low-rank one beside it, as peft's."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.r = base.requires_grad_(False), {"default": RANK}
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 2 * self.lora_B(self.lora_A(x))


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, scale=None):
        q, k, v = self.qkv(self.norm(x)).view(len(x), -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.dropout(self.out(attended)) * scale
        return x + self.down(F.gelu(self.up(self.norm(x)))) * scale


class Net(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self, depth=3, lora=False, dropout=0.0):
        super().__init__()
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(Block(dropout) for _ in range(depth))
        for block in self.layers if lora else ():
            block.up, block.out = Adapter(block.up), Adapter(block.out)

    def forward(self, x, scale):
        for block in self.layers:
            x = block(x, scale=scale)
        return x


def count_calls(net):
    """How often each block's forward runs from now on."""
    calls = Counter()
    for i, block in enumerate(net.layers):
        block.qkv.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))
    return calls


def inputs(device="cpu"):
    return torch.randn(ROWS, TOKENS, WIDTH, device=device, requires_grad=True), torch.randn(1, 1, WIDTH, device=device)


def step(net, x, scale):
    """Output and every gradient, the input's included."""
    out = net(x, scale)
    (out * out.detach().cos()).sum().backward()
    found = [out.detach(), x.grad.clone(), *gradients(net).values()]
    x.grad = None
    return found


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


class Operations(TorchDispatchMode):
    """Counts operations by name and shapes."""

    def __init__(self):
        super().__init__()
        self.counts, self.names = Counter(), Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
        self.counts[op, shapes] += 1
        self.names[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def backward_names(net, *given):
    out = net(*given).sum()
    with Operations() as seen:
        out.backward()
    return seen.names
