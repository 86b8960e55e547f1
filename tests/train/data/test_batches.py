"""The order of the data: each entry once an epoch, the same on every run, resumed at exactly the next batch."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.tiny_pipelines import saved_pipeline
from PIL import Image
from sklearn.datasets import load_digits

from twinflow.train.data.batches import Batches
from twinflow.train.data.buckets import buckets
from twinflow.train.data.build_cache import CacheOptions, build_cache
from twinflow.train.data.cache import open_cache
from twinflow.train.data.encoders import Encoders
from twinflow.train.data.images import read_folder

COUNTS = {(32, 32): 9, (48, 24): 5, (24, 48): 2}  # the last has fewer than a batch


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    data = folder / "data"
    data.mkdir()
    images = iter(load_digits().images)
    for (height, width), count in COUNTS.items():
        for k in range(count):
            image = Image.fromarray((next(images) * 15).astype(np.uint8)).resize((width, height))
            image.save(data / f"{height}-{k}.png")
            (data / f"{height}-{k}.txt").write_text("a digit" + " again" * k)
    encoders = Encoders(saved_pipeline("qwen_image"))
    sizes = [(24, 48), (32, 32), (48, 24)]
    assert {*sizes} <= {*buckets(32, 4), (24, 48), (48, 24)}
    built = build_cache(folder / "cache", read_folder(data), encoders, sizes, options=CacheOptions(text_batch=3))
    assert Counter(e.size for e in built.entries) == COUNTS
    return built


def names(batches) -> list[str]:
    return [entry.name for entry in batches.take()]


@pytest.mark.parametrize("batch, world", [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (3, 3)])
def test_each_entry_once_an_epoch(cache, batch, world):
    ranks = [Batches(cache.entries, batch=batch, rank=rank, world=world, seed=5) for rank in range(world)]
    sizes = {e.name: e.size for e in cache.entries}
    drawn, length, epochs = Counter(), batch * world, 12
    while True:
        found = [name for rank in ranks for name in names(rank)]
        if ranks[0].state_dict()["epoch"] == epochs:
            break
        assert len(found) == length and len({sizes[name] for name in found}) == 1
        assert len({*found}) == min(length, COUNTS[sizes[found[0]]]) or length > COUNTS[sizes[found[0]]]
        drawn.update(found)
    for size, count in COUNTS.items():
        of_size = [drawn[name] for name, at in sizes.items() if at == size]
        assert 0 <= epochs * count - sum(of_size) < length, "only what waits for a whole group is not drawn yet"
        assert max(of_size) <= epochs and min(of_size) >= epochs - (length - 1) // count - 1


def test_whole_batches_draw_each_entry_exactly_once(cache):
    batches = Batches(cache.entries, batch=1)
    orders = [[names(batches)[0] for _ in cache.entries] for _ in range(3)]
    assert all(sorted(order) == sorted(e.name for e in cache.entries) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_the_order_is_the_seeds(cache):
    def order(**options):
        batches = Batches(cache.entries, batch=2, **options)
        return [names(batches) for _ in range(30)]

    assert order(seed=3) == order(seed=3) != order(seed=4)
    again = Batches(open_cache(cache.folder).entries[::-1], batch=2, seed=3)
    assert [names(again) for _ in range(30)] == order(seed=3), "whatever the order of the entries"


@pytest.mark.parametrize("world", [1, 2])
def test_a_loaded_state_goes_on_with_the_next_batch(cache, world):
    options = dict(batch=2, seed=7, rank=world - 1, world=world)
    batches = Batches(cache.entries, **options)
    states, drawn = [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(batches.state_dict())))
        drawn.append(names(batches))
    assert batches.state_dict()["epoch"] >= 3
    for at in (0, 1, 17, 5, 39):  # back and forth
        for other in (batches, Batches(cache.entries, **options)):
            other.load_state_dict(states[at])
            assert [names(other) for _ in drawn[at : at + 5]] == drawn[at : at + 5]


def test_a_batch_is_its_entries_rows(cache):
    batches = Batches(cache.entries, batch=2)
    for _ in range(8):
        rows = batches.take()
        latents, cond = cache.latents(rows), cache.condition(rows)
        for number, row in enumerate(rows):
            own, length = cache.condition([row]), int(cond["prompt_lengths"][number])
            assert torch.equal(cache.latents([row])[0], latents[number])
            assert int(own["prompt_lengths"]) == length
            assert torch.equal(own["prompt_embeds"][0], cond["prompt_embeds"][number, :length])


def test_bad_input(cache):
    for options, match in (
        (dict(batch=0), "batch must be an integer >= 1, got 0"),
        (dict(batch=True), "batch must be"),
        (dict(batch=1, rank=2, world=2), "rank must be below world=2, got 2"),
        (dict(batch=1, entries=[]), "entries must hold something to draw, got none"),
    ):
        with pytest.raises(ValueError, match=f"^Batches: {match}"):
            Batches(**{"entries": cache.entries, **options})
    batches = Batches(cache.entries, batch=2)
    batches.take()
    state = batches.state_dict()
    for change, match in (
        (dict(seed=1), "seed=0, got 1"),
        (dict(batch=3), "batch=2, got 3"),
        (dict(epoch=-1), "epoch as an integer >= 0"),
        (dict(position=None), "position as an integer >= 0"),
    ):
        with pytest.raises(ValueError, match=f"^Batches: state must .*{match}"):
            batches.load_state_dict(state | change)
    assert batches.state_dict() == state


def test_other_data_begins_a_new_order_that_resumes(cache):
    """The state of fewer entries: the next epoch in an order of all of them, which resumes at the next batch."""
    before = Batches(cache.entries[:-3], batch=2, seed=7)
    for _ in range(20):
        before.take()
    batches = Batches(cache.entries, batch=2, seed=7)
    assert batches.knows(batches.state_dict()) and not batches.knows(before.state_dict())
    batches.load_state_dict(before.state_dict())
    assert batches.state_dict()["epoch"] == before.state_dict()["epoch"] + 1 == batches.began
    states, drawn = [], []
    for _ in range(20):
        states.append(batches.state_dict())
        drawn.append(names(batches))
    assert {name for group in drawn for name in group} == {e.name for e in cache.entries}
    again = Batches(cache.entries, batch=2, seed=7)
    for at in (0, 9, 15):
        again.load_state_dict(states[at])
        assert [names(again) for _ in drawn[at:]] == drawn[at:]
