"""`DeferredStep`: the modulation of every call of a step, computed at its beginning and differentiated at its end."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twinflow.memory.modulation.table import Autocast, ModulationTable
from twinflow.objective.passes import Pass, Plan

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

    call: Pass
    embedding: torch.Tensor
    carrier: torch.Tensor | None = None

    @property
    def differentiable(self) -> bool:
        """Whether its gradient is wanted."""
        return self.embedding.requires_grad


class DeferredStep:
    """What is computed in advance for one step.

    Args:
        table: of the network.
        plan: the step's calls.
    """

    def __init__(self, table: ModulationTable, plan: Plan) -> None:
        self._table, self.plan = table, plan
        self.entries: deque[Entry] = deque()
        self.ready = False
        self._gathered: _Gathered | None = None

    def compute(self, by_pieces: bool) -> None:
        """Computes the vectors of all entries in one pass over the weights.

        Args:
            by_pieces: each piece is differentiated before the next one's forward.
        """
        entries = list(self.entries)
        for entry, carrier in zip(entries, self._table.carriers([e.embedding for e in entries]), strict=True):
            entry.carrier = carrier
        wanted = [entry for entry in entries if entry.differentiable]
        pieces = [[e for e in wanted if e.call.piece == n] for n in sorted({e.call.piece for e in wanted})]
        self._gathered = connect(self._table, pieces if by_pieces else [wanted] if wanted else [])
        self.ready = True

    def settle(self) -> None:
        """Passes on the gradients of pieces whose last one was not differentiated."""
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
            raise RuntimeError(
                "defer_modulation: a step must make the calls of its plan, got one more; call the student outside of "
                "TwinFlowLoss only between steps"
            )
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


def connect(table: ModulationTable, pieces: Sequence[Sequence[Entry]]) -> "_Gathered":
    """Makes carriers differentiable: the weights are passed once, when the last piece is differentiated.

    Args:
        table: of the network.
        pieces: entries whose carriers become differentiable, by piece, in the order of their backward.
    """
    gathered = _Gathered(table, pieces)
    for number in reversed(range(len(pieces))):  # autograd runs what was made first last
        last = number + 1 == len(pieces)
        inputs = [entry.embedding for entry in pieces[number]] if last else [_anchor()]
        carriers = [entry.carrier for entry in pieces[number]]
        for entry, carrier in zip(pieces[number], _Modulated.apply(gathered, number, carriers, *inputs), strict=True):
            entry.carrier = carrier
    return gathered


def _anchor() -> torch.Tensor:
    """Keeps a node in the graph that has no input of its own."""
    return torch.zeros((), requires_grad=True)


class _Gathered:
    """Gradients of carriers, until the last piece has its own."""

    def __init__(self, table: ModulationTable, pieces: Sequence[Sequence[Entry]]) -> None:
        self._table = table
        self._embeddings = [[entry.embedding for entry in piece] for piece in pieces]
        self._gradients: list[list[torch.Tensor | None]] = [[None] * len(piece) for piece in pieces]
        self._complete = False
        first = next((e for piece in self._embeddings for e in piece), None)
        self._autocast = None if first is None else Autocast(first.device)

    def add(self, piece: int, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Takes a piece's gradients; of the last piece gives those of its embeddings.

        Raises:
            RuntimeError: the last piece has come already.
        """
        last = piece + 1 == len(self._gradients)
        if self._complete and not last:
            raise RuntimeError(
                "defer_modulation: the pieces of a step must be differentiated in order or together, got the last "
                "one before others"
            )
        self._gradients[piece] = list(gradients)
        if not last:
            return [None]
        self._complete = not _keeps_graph()  # a kept graph may be passed again
        return self._pass_on(_keeps_graph())[-1]

    def settle(self) -> None:
        """Passes on what has come, where the last piece has not."""
        if not self._complete and any(g is not None for held in self._gradients for g in held):
            _accumulate(self._embeddings[-1], self._pass_on(True)[-1], True)

    def _pass_on(self, keep: bool) -> list[list[torch.Tensor | None]]:
        """Gradients of all embeddings, those of all pieces but the last added to what lies upstream."""
        embeddings = [embedding for held in self._embeddings for embedding in held]
        carriers = [gradient for held in self._gradients for gradient in held]
        self._gradients = [[None] * len(held) for held in self._gradients]
        assert self._autocast is not None
        with torch.no_grad(), self._autocast.again():
            found = iter(self._table.gradients(embeddings, carriers))
        by_piece = [[next(found) for _ in held] for held in self._embeddings]
        for held, theirs in zip(self._embeddings[:-1], by_piece[:-1], strict=True):
            _accumulate(held, theirs, keep)
        return by_piece


class _Modulated(torch.autograd.Function):
    """Gives carriers a gradient."""

    @staticmethod
    def forward(
        ctx: Any, gathered: _Gathered, piece: int, carriers: list[torch.Tensor], *embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.gathered, ctx.piece = gathered, piece
        ctx.set_materialize_grads(False)
        return tuple(carriers)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        return None, None, None, *ctx.gathered.add(ctx.piece, gradients)


def _accumulate(embeddings: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], keep: bool) -> None:
    """Adds to `.grad` what lies upstream of some embeddings.

    The hooks of parameters do not run: under DDP they wait for the last piece, which synchronises all.
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
