"""`RoleCounter`: which role each row of the training stream has, exactly in proportion, for any batch size."""

from collections.abc import Mapping
from fractions import Fraction
from math import lcm
from typing import Any

from twinflow.errors import ArgumentError

_LONGEST_CYCLE = 1000


class RoleCounter:
    """Deals roles so that over every prefix of the stream each role's count is within one row of its share.

    Tijdeman's rule for the chairman assignment problem: among the roles that are owed enough, the next row goes to the
    one whose debt runs out of bounds first. Exact rational arithmetic; the state is one integer per role.

    Args:
        shares: role -> share > 0 of the stream, summing to 1.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        exact = {role: Fraction(share) for role, share in shares.items()}
        total = sum(exact.values())
        self._whole = lcm(*((share / total).denominator for share in exact.values()))
        # Shares as integers that sum to `_whole`; the arithmetic below is in units of 1 / `_whole`.
        self._shares = {role: int(share / total * self._whole) for role, share in exact.items()}
        self.counts = dict.fromkeys(self._shares, 0)
        # The stream repeats after `_whole` rows; a short period is dealt once.
        self._cycle: tuple[str, ...] = ()
        self._cycle = self._deal(dict(self.counts), self._whole) if self._whole <= _LONGEST_CYCLE else ()

    @property
    def rows(self) -> int:
        """The number of rows dealt so far."""
        return sum(self.counts.values())

    def peek(self, rows: int) -> tuple[str, ...]:
        """The roles of the next `rows` rows, without dealing them."""
        return self._deal(dict(self.counts), rows)

    def take(self, rows: int) -> tuple[str, ...]:
        """Deals the next `rows` rows and returns their roles."""
        return self._deal(self.counts, rows)

    def _deal(self, counts: dict[str, int], rows: int) -> tuple[str, ...]:
        if len(counts) == 1:
            (role,) = counts
            counts[role] += rows
            return (role,) * rows
        done = sum(counts.values())
        if self._on_cycle(counts, done):
            start = done % self._whole
            cycle = self._cycle * ((start + rows) // self._whole + 1)
            roles = cycle[start : start + rows]
            for role in counts:
                counts[role] += roles.count(role)
            return roles
        dealt: list[str] = []
        # A role is due once it is owed 1 / parts of a row; the next row is that of the due role whose debt would be
        # the first to exceed 1 - 1 / parts.
        parts, whole = 2 * len(counts) - 2, self._whole
        for position in range(done + 1, done + 1 + rows):
            chosen, chosen_room = "", 0
            for role, share in self._shares.items():
                owed = parts * (position * share - counts[role] * whole)
                if owed < whole:
                    continue
                room = (parts - 1) * whole - owed  # over share: the time left
                if not chosen or room * self._shares[chosen] < chosen_room * share:
                    chosen, chosen_room = role, room
            counts[chosen] += 1
            dealt.append(chosen)
        return tuple(dealt)

    def _on_cycle(self, counts: dict[str, int], done: int) -> bool:
        """Whether the counts are those of the stream's own beginning; others may have been loaded."""
        periods, start = divmod(done, self._whole)
        past = self._cycle[:start]
        return bool(self._cycle) and all(n == periods * self._shares[r] + past.count(r) for r, n in counts.items())

    def state_dict(self) -> dict[str, Any]:
        """The rows dealt to each role."""
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved state; ValueError if it deals other roles."""
        counts = dict(state["counts"])
        if set(counts) != set(self.counts):
            raise ArgumentError("RoleCounter", "counts", f"for roles {sorted(self.counts)}", sorted(counts))
        self.counts = {role: int(counts[role]) for role in self.counts}
