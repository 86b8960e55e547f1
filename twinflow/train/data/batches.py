"""`Batches`: an endless, reproducible order of a cache's entries, dealt to ranks."""

import hashlib
from collections.abc import Sequence
from typing import Any

from twinflow.errors import require
from twinflow.train.data.buckets import Size
from twinflow.train.data.cache import Entry

Group = list[Entry]  # a batch of every rank, in rank order


class Batches:
    """Batches of entries without an end; all rows of a batch, and of a step on all ranks, have one size.

    Attributes:
        began: epoch that this order began with: 0, or later where the data changed under way.

    Each size's entries are shuffled anew in each epoch and follow each other epoch by epoch: such a stream is cut into
    groups of batch x world entries, and an epoch's groups of all sizes are shuffled. What is left of an epoch begins
    the next one's first group, so nothing is ever dropped: after any number of whole epochs each entry was drawn once
    per epoch, but for those waiting, fewer than batch x world of each size. No entry is twice in a group unless there
    are fewer of its size than a group takes: then they repeat in turn, when the epochs have gathered enough for one.

    Args:
        batch: rows of a batch, on one rank.
        seed: of the order, the same on every rank.
        rank, world: this process, of how many.

    Raises:
        ValueError: nothing to draw, or numbers that do not fit.
    """

    def __init__(self, entries: Sequence[Entry], *, batch: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        for name, value, least in (("batch", batch, 1), ("world", world, 1), ("rank", rank, 0), ("seed", seed, 0)):
            require(type(value) is int and value >= least, "Batches", name, f"an integer >= {least}", repr(value))
        require(rank < world, "Batches", "rank", f"below world={world}", rank)
        require(entries, "Batches", "entries", "something to draw", "none", verb="hold")
        self._seed, self._batch, self._rank, self._world = seed, batch, rank, world
        self._by_size: dict[Size, Group] = {}
        for entry in sorted(entries, key=lambda e: (e.size, e.name)):
            self._by_size.setdefault(entry.size, []).append(entry)
        told = "\n".join(f"{e.name} {e.size} {e.latents} {e.condition}" for of in self._by_size.values() for e in of)
        self._data = hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()
        self._begin()

    def take(self) -> Group:
        """The entries of this rank's next batch, which are not read; all of one size, the same on every rank."""
        while self._position >= len(self._groups):
            self._next_epoch()
        group = self._groups[self._position]
        self._position += 1
        return group[self._rank * self._batch : (self._rank + 1) * self._batch]

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is, and of which order: numbers and a hash, the same on every rank."""
        place = {"epoch": self._epoch, "position": self._position, "began": self.began}
        return {**place, **self._order(), "data": self._data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the batch that would have been next; of other data, with the next epoch in a new order.

        Raises:
            ValueError: a state of another seed, batch or number of ranks; nothing is then changed.
        """
        for name, mine in self._order().items():
            require(state.get(name) == mine, "Batches", "state", f"of {name}={mine}", repr(state.get(name)))
        began = state.get("began", 0)  # earlier checkpoints do not have it
        for name, value in (("epoch", state.get("epoch")), ("position", state.get("position")), ("began", began)):
            whole = type(value) is int and value >= 0
            require(whole, "Batches", "state", f"{name} as an integer >= 0", repr(value), verb="have")
        if not self.knows(state):
            return self._begin(state["epoch"] + 1)
        self._begin(began)
        while self._epoch < state["epoch"]:
            self._next_epoch()
        self._position = state["position"]

    def knows(self, state: dict[str, Any]) -> bool:
        """Whether a state is one of the same images, captions and sizes."""
        return state.get("data") == self._data

    def _order(self) -> dict[str, Any]:
        return {"seed": self._seed, "batch": self._batch, "world": self._world}

    def _begin(self, epoch: int = 0) -> None:
        self.began, self._epoch, self._waiting = epoch, epoch - 1, {size: Group() for size in self._by_size}
        self._next_epoch()

    def _next_epoch(self) -> None:
        """Shuffles each size's entries, joins them to those waiting, and cuts whole groups off."""
        self._epoch, self._position = self._epoch + 1, 0
        length, groups = self._batch * self._world, []
        for size, entries in self._by_size.items():
            waiting = self._waiting[size]
            stream = waiting + self._shuffled(entries, waiting, length)
            whole = len(stream) // length * length
            groups += [stream[first : first + length] for first in range(0, whole, length)]
            self._waiting[size] = stream[whole:]
        keyed = [(self._rank_of(f"{k} {group[0].size}"), group) for k, group in enumerate(groups)]
        self._groups = [group for _, group in sorted(keyed, key=lambda pair: pair[0])]

    def _shuffled(self, entries: Group, waiting: Group, length: int) -> Group:
        """The entries in this epoch's order, but first those that do not wait: as many as the begun group takes."""
        order = sorted(entries, key=lambda e: self._rank_of(e.name))
        held = {e.name for e in waiting}
        first = [e for e in order if e.name not in held][: length - len(waiting)]
        taken = {e.name for e in first}
        return first + [e for e in order if e.name not in taken]

    def _rank_of(self, name: str) -> bytes:
        """A hash to sort by: the same shuffle on every machine and version, whatever else is in the data."""
        return hashlib.sha256(f"{self._seed} {self._epoch} {name}".encode(errors="surrogateescape")).digest()
