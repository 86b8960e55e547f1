"""`DeferredStep`: the modulation of every call of a step, computed at its beginning and differentiated at its end."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from twinflow.memory.modulation.table import ModulationTable, autocast_as_now
from twinflow.objective.plan import NetworkCall, Plan

# Whether the backward that runs now was asked to keep its graph; True where torch does not say: it is freed with it.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


@dataclass
class Entry:
    """One time embedding of a step.

    Args:
        call: the network call that it belongs to.
        embedding: (B, D), with its graph where something trained has made it.
        carrier: its modulation vectors, differentiable where the embedding is; None until they are computed.
    """

    call: NetworkCall
    embedding: torch.Tensor
    carrier: torch.Tensor | None = None

    @property
    def differentiable(self) -> bool:
        """Whether its gradient is wanted."""
        return self.embedding.requires_grad


class DeferredStep:
    """What is computed in advance for one step."""

    def __init__(self, table: ModulationTable, plan: Plan) -> None:
        self._table, self.plan = table, plan
        self.entries: deque[Entry] = deque()
        self.ready = False
        self._gathered: _Gathered | None = None

    def compute(self, by_micro_batch: bool) -> None:
        """Computes the vectors of all entries in one pass over the weights.

        Args:
            by_micro_batch: each micro-batch is differentiated before the next one's forward.
        """
        entries = list(self.entries)
        for entry, carrier in zip(entries, self._table.carriers([e.embedding for e in entries]), strict=True):
            entry.carrier = carrier
        wanted = [entry for entry in entries if entry.differentiable]
        micro_batches = [
            [e for e in wanted if e.call.micro_batch == n] for n in sorted({e.call.micro_batch for e in wanted})
        ]
        self._gathered = connect(self._table, micro_batches if by_micro_batch else [wanted] if wanted else [])
        self.ready = True

    def settle(self) -> None:
        """Passes on the gradients of micro-batches whose last one was not differentiated."""
        if self._gathered is not None:
            self._gathered.settle()

    def take(self, embedding: torch.Tensor) -> torch.Tensor:
        """The carrier of the next entry.

        Args:
            embedding: what the network has computed in the call itself.

        Raises:
            RuntimeError: the call is not the one that was planned.
        """
        if not self.entries:
            hint = "call the student outside of TwinFlowLoss only between steps"
            raise RuntimeError(f"defer_modulation: a step must make the calls of its plan, got one more; {hint}")
        entry = self.entries.popleft()
        shapes = tuple(entry.embedding.shape), tuple(embedding.shape)
        if shapes[0] != shapes[1] or not _alike(entry.embedding, embedding):
            raise RuntimeError(
                f"defer_modulation: a step must make the calls of its plan in order, got a call with {shapes[1][0]} "
                f"rows of other times where {entry.call.name} with {shapes[0][0]} rows was due"
            )
        assert entry.carrier is not None
        return entry.carrier


def _alike(planned: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether two embeddings are of the same times, but for rounding; not looked at on a GPU, which would wait."""
    if planned.device.type != "cpu":
        return True
    planned, given = planned.detach().float(), given.detach().float()
    return bool((planned - given).abs().max() <= 0.02 * planned.abs().max())


def connect(table: ModulationTable, micro_batches: Sequence[Sequence[Entry]]) -> "_Gathered":
    """Makes carriers differentiable: the weights are passed once, when the last micro-batch is differentiated.

    Args:
        micro_batches: entries whose carriers become differentiable, by micro-batch, in the order of their backward.
    """
    gathered = _Gathered(table, micro_batches)
    for number in reversed(range(len(micro_batches))):  # autograd runs what was made first last
        last = number + 1 == len(micro_batches)
        inputs = [entry.embedding for entry in micro_batches[number]] if last else [_anchor()]
        carriers = [entry.carrier for entry in micro_batches[number]]
        for entry, carrier in zip(
            micro_batches[number], _Modulated.apply(gathered, number, carriers, *inputs), strict=True
        ):
            entry.carrier = carrier
    return gathered


def _anchor() -> torch.Tensor:
    """Keeps a node in the graph that has no input of its own."""
    return torch.zeros((), requires_grad=True)


class _Gathered:
    """Gradients of carriers, until the last micro-batch has its own."""

    def __init__(self, table: ModulationTable, micro_batches: Sequence[Sequence[Entry]]) -> None:
        self._table = table
        self._embeddings = [[entry.embedding for entry in micro_batch] for micro_batch in micro_batches]
        self._gradients: list[list[torch.Tensor | None]] = [[None] * len(micro_batch) for micro_batch in micro_batches]
        self._complete = False
        first = next((e for micro_batch in self._embeddings for e in micro_batch), None)
        self._autocast = nullcontext if first is None else autocast_as_now(first.device)

    def add(self, micro_batch: int, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Takes a micro-batch's gradients; of the last micro-batch gives those of its embeddings.

        Raises:
            RuntimeError: the last micro-batch has come already.
        """
        last = micro_batch + 1 == len(self._gradients)
        if self._complete and not last:
            wanted = "differentiated in order or together, got the last one before others"
            raise RuntimeError(f"defer_modulation: the micro-batches of a step must be {wanted}")
        self._gradients[micro_batch] = list(gradients)
        if not last:
            return [None]
        self._complete = not _keeps_graph()  # a kept graph may be passed again
        return self._pass_on(_keeps_graph())[-1]

    def settle(self) -> None:
        """Passes on what has come, where the last micro-batch has not."""
        if not self._complete and any(g is not None for held in self._gradients for g in held):
            _accumulate(self._embeddings[-1], self._pass_on(True)[-1], True)

    def _pass_on(self, keep: bool) -> list[list[torch.Tensor | None]]:
        """Gradients of all embeddings, those of all micro-batches but the last added to what lies upstream."""
        embeddings = [embedding for held in self._embeddings for embedding in held]
        carriers = [gradient for held in self._gradients for gradient in held]
        self._gradients = [[None] * len(held) for held in self._gradients]
        with torch.no_grad(), self._autocast():
            found = iter(self._table.gradients(embeddings, carriers))
        by_piece = [[next(found) for _ in held] for held in self._embeddings]
        for held, theirs in zip(self._embeddings[:-1], by_piece[:-1], strict=True):
            _accumulate(held, theirs, keep)
        return by_piece


class _Modulated(torch.autograd.Function):
    """Gives carriers a gradient."""

    @staticmethod
    def forward(
        ctx: Any, gathered: _Gathered, micro_batch: int, carriers: list[torch.Tensor], *embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.gathered, ctx.micro_batch = gathered, micro_batch
        ctx.set_materialize_grads(False)
        return tuple(carriers)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        return None, None, None, *ctx.gathered.add(ctx.micro_batch, gradients)


def _accumulate(embeddings: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], keep: bool) -> None:
    """Adds to `.grad` what lies upstream of some embeddings.

    The hooks of parameters do not run: under DDP they wait for the last micro-batch, which synchronises all.
    """
    known = [(e, g) for e, g in zip(embeddings, gradients, strict=True) if g is not None]
    if not known:
        return
    leaves = list(_leaves([embedding for embedding, _ in known]))
    outputs, grads = zip(*known, strict=True)
    found = torch.autograd.grad(outputs, leaves, grads, retain_graph=keep, allow_unused=True)
    for leaf, gradient in zip(leaves, found, strict=True):
        if gradient is not None and leaf.grad is not None:
            leaf.grad.detach().add_(gradient)
        elif gradient is not None:
            leaf.grad = torch.empty_like(leaf, requires_grad=False).copy_(gradient)


def _leaves(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The parameters that some tensors come from."""
    waiting = [tensor.grad_fn for tensor in tensors]
    seen = set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]
