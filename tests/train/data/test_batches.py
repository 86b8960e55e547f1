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
from twinflow.train.data.build_cache import CacheOptions, build_cache, open_cache
from twinflow.train.data.encoders import Encoders, collate
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


def epoch_of(batches) -> list:
    """Names of the batches of the epoch that begins."""
    found, start = [], None
    while True:
        state = batches.state_dict()
        names = next(batches)[2]
        if start is None:
            start = batches.epoch
        if batches.epoch != start:
            batches.load_state_dict(state)
            return found
        found.append(names)


@pytest.mark.parametrize("batch, world", [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (3, 3)])
def test_each_entry_once_an_epoch(cache, batch, world):
    ranks = [Batches(cache, batch=batch, rank=rank, world=world, names=True, seed=5) for rank in range(world)]
    sizes = {e.name: e.size for e in cache.entries}
    drawn, length, epochs = Counter(), batch * world, 12
    while True:
        steps = [next(rank) for rank in ranks]
        if ranks[0].epoch == epochs:
            break
        names = [name for _, _, found in steps for name in found]
        assert len(names) == length and len({sizes[name] for name in names}) == 1
        assert len({*names}) == min(length, COUNTS[sizes[names[0]]]) or length > COUNTS[sizes[names[0]]]
        drawn.update(names)
    for size, count in COUNTS.items():
        of_size = [drawn[name] for name, at in sizes.items() if at == size]
        assert 0 <= epochs * count - sum(of_size) < length, "only what waits for a whole group is not drawn yet"
        assert max(of_size) <= epochs and min(of_size) >= epochs - (length - 1) // count - 1


def test_whole_batches_draw_each_entry_exactly_once(cache):
    batches = Batches(cache, batch=1, names=True)
    orders = []
    for _ in range(3):
        names = [name for found in epoch_of(batches) for name in found]
        assert sorted(names) == sorted(e.name for e in cache.entries)
        orders.append(names)
    assert orders[0] != orders[1] != orders[2]


def test_the_order_is_the_seeds(cache):
    def order(**options):
        batches = Batches(cache, batch=2, names=True, **options)
        return [next(batches)[2] for _ in range(30)]

    assert order(seed=3) == order(seed=3) != order(seed=4)
    again = Batches(open_cache(cache.folder), cache.entries[::-1], batch=2, names=True, seed=3)
    assert [next(again)[2] for _ in range(30)] == order(seed=3), "whatever the order of the entries"


@pytest.mark.parametrize("world", [1, 2])
def test_a_loaded_state_goes_on_with_the_next_batch(cache, world):
    options = dict(batch=2, seed=7, names=True, rank=world - 1, world=world)
    batches = Batches(cache, **options)
    states, drawn = [], []
    for _ in range(40):
        states.append(json.loads(json.dumps(batches.state_dict())))
        drawn.append(next(batches))
    assert batches.epoch >= 3
    for at in (0, 1, 17, 5, 39):  # back and forth
        for other in (batches, Batches(cache, **options)):
            other.load_state_dict(states[at])
            for expected in drawn[at : at + 5]:
                latents, cond, names = next(other)
                assert names == expected[2] and torch.equal(latents, expected[0])
                assert all(torch.equal(cond[name], leaf) for name, leaf in expected[1].items())


def test_batches_are_the_caches_rows(cache):
    entries = {e.name: e for e in cache.entries}
    encoders = Encoders(saved_pipeline("qwen_image"))
    batches = Batches(cache, batch=2, names=True)
    for _ in range(8):
        latents, cond, names = next(batches)
        rows = [entries[name] for name in names]
        assert latents.shape == (2, *encoders.latent_shape(rows[0].size))
        expected = collate(encoders.prompts([row.caption for row in rows]))
        assert torch.equal(cond["prompt_lengths"], expected["prompt_lengths"])
        torch.testing.assert_close(cond["prompt_embeds"], expected["prompt_embeds"], rtol=1e-4, atol=1e-4)
        for row, found in zip(rows, latents, strict=True):
            assert torch.equal(cache.latents([row])[0], found)


def test_bad_input(cache):
    for options, match in (
        (dict(batch=0), "batch must be an integer >= 1, got 0"),
        (dict(batch=True), "batch must be"),
        (dict(batch=1, rank=2, world=2), "rank must be below world=2, got 2"),
        (dict(batch=1, entries=[]), "entries must hold something to draw, got none"),
    ):
        with pytest.raises(ValueError, match=f"^Batches: {match}"):
            Batches(cache, **options)
    batches = Batches(cache, batch=2)
    next(batches)
    state = batches.state_dict()
    for change, match in (
        (dict(seed=1), "seed=0, got 1"),
        (dict(batch=3), "batch=2, got 3"),
        (dict(data="x"), "the same images, captions and sizes"),
        (dict(epoch=-1), "epoch as an integer >= 0"),
        (dict(position=None), "position as an integer >= 0"),
    ):
        with pytest.raises(ValueError, match=f"^Batches: state must .*{match}"):
            batches.load_state_dict(state | change)
    assert batches.state_dict() == state
