"""Networks, and copies as late as a GPU may do them, for the tests of activation offload."""

import gc

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from twinflow.memory.offload import hooks as offload_hooks
from twinflow.memory.offload.activations import offload_activations
from twinflow.memory.offload.host_pool import Transfers

KB = 4096  # what one row of these tests' tensors takes


class LateCopy:
    """A copy between a buffer's parts and device memory that only its owner keeps."""

    def __init__(self, memory, parts, out):
        self.ref, self.offset = StorageWeakRef(memory.untyped_storage()), memory.storage_offset()
        self.nbytes = len(memory)
        self.parts, self.out, self.done = parts, out, False

    def run(self):
        if self.done:
            return
        self.done = True
        storage = torch.UntypedStorage._new_with_weak_ptr(self.ref.cdata)
        assert storage is not None, "device memory was given back while its copy was under way"
        memory = torch.empty(0, dtype=torch.uint8).set_(storage, self.offset, (self.nbytes,), (1,))
        Transfers(False)._copy(memory, self.parts, self.out)


class LateTransfers(Transfers):
    """A GPU at its worst: every copy happens as late as it may, and what is not back yet reads as NaN."""

    asynchronous = True

    def __init__(self):
        self.saves, self.loads, self.errors, self.peak, self.log = [], [], [], 0, []

    def save(self, source, parts):
        for load in self.loads:  # the stream of saves waits for the other
            load.done or load.run()
        self.saves.append(LateCopy(source, parts, out=True))
        return self.saves[-1]

    def load(self, target, parts, saved):
        saved.run()
        target.fill_(255)
        self.loads.append(LateCopy(target, parts, out=False))
        alive = sum(load.nbytes for load in self.loads if not load.ref.expired())
        self.peak = max(self.peak, alive)
        self.log.append(("load", len(self.loads) - 1))
        return self.loads[-1]

    def ready(self, ticket):
        if ticket is not None:
            self.log.append(("ready", self.loads.index(ticket)))
        self.settle(ticket)

    def early(self):
        """How many loads were under way before they were asked for."""
        asked = [self.log.index(("ready", number)) for number in range(len(self.loads))]
        return sum(self.log[i - 1] != ("load", number) for number, i in enumerate(asked))

    def settle(self, ticket):
        try:
            if ticket is not None:
                ticket.run()
        except AssertionError as error:  # finalizers raise nothing
            self.errors.append(error)


def copies(kind, monkeypatch):
    """What a fixture yields for copies `at once` or `late`; no late copy may have lost its memory."""
    if kind == "at once":
        yield None
        return
    late = LateTransfers()
    monkeypatch.setattr(offload_hooks, "transfers_for", lambda *_: late)
    yield late
    assert not late.errors
    unsettled = [copy for copy in late.saves + late.loads if not copy.done and copy.ref.expired()]
    assert not unsettled, "device memory was given back while its copy was under way"


class Block(nn.Module):
    """Attention and an MLP; chunks, transposes and a shared input among what they save."""

    def __init__(self, width=32):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.register_buffer("scale", torch.rand(16, width))

    def forward(self, x):
        q, k, v = (h.unflatten(-1, (2, -1)).transpose(1, 2) for h in self.qkv(self.norm(x)).chunk(3, -1))
        attended = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).flatten(2)) * self.scale
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.blocks, self.checkpointed = nn.ModuleList(Block() for _ in range(3)), checkpointed

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x.square().sum()


def equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def make(budget_gb=0.05, **options):
    return offload_activations(budget_gb, **(dict(min_bytes=0, in_flight_bytes=3 * KB) | options))


def drained(offload):
    gc.collect()
    return offload.stats.pool_bytes == 0


class Keep(torch.autograd.Function):
    """Saves what it is given, and hands it out again in backward."""

    @staticmethod
    def forward(ctx, seen, x, *saved):
        ctx.save_for_backward(*saved)
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        ctx.seen.append(ctx.saved_tensors)
        return None, dout, *[None] * len(ctx.saved_tensors)


def kept(context, *saved):
    """A graph that holds tensors, and the list that backward puts them in."""
    seen, x = [], torch.ones((), requires_grad=True)
    with context:
        return Keep.apply(seen, x, *saved), seen


def rows(count):
    """A tensor of `count` x `KB` bytes that is no leaf's own memory."""
    return torch.randn(count, KB // 4) * 1
