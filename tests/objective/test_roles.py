"""Roles come from a counter: exact shares over every prefix, for any sequence of batch sizes."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinflow import TwinFlowConfig, TwinFlowLoss
from twinflow.objective.config import ROLES
from twinflow.objective.roles import RoleCounter

SHARES = st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=5, max_size=5).filter(lambda s: max(s) > 1e-3)


def shares_of(values):
    """Shares as a counter takes them; those that are not 0 are not tiny either."""
    config = TwinFlowConfig(shares={role: value for role, value in zip(ROLES, values, strict=True) if value > 1e-3})
    return config.active_shares()


def assert_within_one_row(shares, roles):
    total = sum(map(Fraction, shares.values()))
    counts = dict.fromkeys(shares, 0)
    for n, role in enumerate(roles, 1):
        counts[role] += 1
        for name, share in shares.items():
            assert abs(counts[name] - n * Fraction(share) / total) < 1, f"{name} after {n} rows"


@settings(max_examples=60, deadline=None)
@given(SHARES, st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_every_prefix_is_within_one_row_of_its_share(values, batches):
    shares = shares_of(values)
    counter = RoleCounter(shares)
    assert_within_one_row(shares, [role for batch in batches for role in counter.take(batch)])


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(SHARES, st.integers(1, 2000))
def test_every_prefix_is_within_one_row_of_its_share_at_length(values, rows):
    shares = shares_of(values)
    assert_within_one_row(shares, RoleCounter(shares).take(rows))


@settings(max_examples=40, deadline=None)
@given(SHARES, st.integers(0, 60), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_batch_sizes_do_not_matter_and_a_state_continues(values, before, batches):
    """The stream of roles is one sequence, however it is cut, saved and loaded."""
    shares = shares_of(values)
    whole = RoleCounter(shares).take(before + sum(batches))
    counter = RoleCounter(shares)
    dealt = [*counter.take(before)]
    for batch in batches:
        resumed = RoleCounter(shares)
        resumed.load_state_dict(counter.state_dict())
        counter = resumed
        assert counter.peek(batch) == counter.peek(batch)
        dealt += counter.take(batch)
    assert tuple(dealt) == whole
    assert counter.rows == len(whole)


def test_equal_shares_fill_every_batch_of_four():
    criterion = TwinFlowLoss(TwinFlowConfig())
    for _ in range(50):
        assert sorted(criterion.draw(torch.zeros(4, 1)).roles) == ["adv", "any", "e2e", "mul"]


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6, 7, 10, 14])
def test_no_batch_size_loses_a_role(batch):
    """Rounding per batch gives no adv row at 6, and two extra at 10; the counter stays within one row."""
    config = TwinFlowConfig()
    criterion = TwinFlowLoss(config)
    roles = [role for _ in range(20) for role in criterion.draw(torch.zeros(batch, 1)).roles]
    assert_within_one_row(config.active_shares(), roles)


def test_roles_without_a_share_never_come():
    config = TwinFlowConfig(adversarial=False, shares={"e2e": 1, "any": 3, "adv": 5})
    roles = TwinFlowLoss(config).draw(torch.zeros(40, 1)).roles
    assert {role: roles.count(role) for role in set(roles)} == {"e2e": 10, "any": 30}


def test_the_counter_is_in_the_criterion_state():
    config = TwinFlowConfig(shares={"e2e": 3, "mul": 1, "any": 2, "one": 1, "adv": 2})
    criterion = TwinFlowLoss(config)
    criterion.draw(torch.zeros(7, 1))
    resumed = TwinFlowLoss(config)
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.draw(torch.zeros(11, 1)).roles == criterion.draw(torch.zeros(11, 1)).roles
    with pytest.raises(ValueError, match="counts must be for roles"):
        TwinFlowLoss(TwinFlowConfig()).load_state_dict(criterion.state_dict())


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_one_sequence(monkeypatch, ranks):
    """The rows of rank 0, then of rank 1, ... are the rows of one process with the whole batch."""
    config = TwinFlowConfig()
    one, latents = TwinFlowLoss(config), torch.zeros(3, 1)
    per_rank = [TwinFlowLoss(config) for _ in range(ranks)]
    for _ in range(5):
        dealt = []
        for rank, criterion in enumerate(per_rank):
            monkeypatch.setattr("twinflow.objective.loss.world", lambda rank=rank: (rank, ranks))
            dealt += criterion.draw(latents).roles
            state = criterion.state_dict()
        monkeypatch.setattr("twinflow.objective.loss.world", lambda: (0, 1))
        assert tuple(dealt) == one.draw(torch.zeros(3 * ranks, 1)).roles
        assert state == one.state_dict()
