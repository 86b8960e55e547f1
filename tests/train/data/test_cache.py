"""The cache: everything is encoded once, whatever ends the process meanwhile."""

import errno
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.cache_cases import FAMILIES, PROMPTS, Counted, assert_close, build, contents, digits, same
from helpers.tiny_pipelines import saved_pipeline
from PIL import Image
from sklearn.datasets import load_sample_images

from twinflow.train.checkpoint.folder_lock import acquire
from twinflow.train.data.buckets import buckets
from twinflow.train.data.build_cache import LOCK, CacheOptions, build_cache
from twinflow.train.data.cache import held_out, open_cache
from twinflow.train.data.encoders import Encoders, collate
from twinflow.train.data.images import read_folder
from twinflow.train.data.shards import Shards


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_what_the_encoders_give_and_a_second_run_encodes_nothing(tmp_path, family):
    data = digits(tmp_path / "data", 3)
    encoders = Counted(family)
    sizes = buckets(32, encoders.multiple)
    first = build_cache(tmp_path / "cache", read_folder(data), encoders, sizes, options=CacheOptions(uncond="bad"))
    again = Counted(family, loads=False)
    second = build_cache(tmp_path / "cache", read_folder(data), again, sizes, options=CacheOptions(uncond="bad"))
    assert second.entries == first.entries and second.entries == open_cache(tmp_path / "cache").entries
    assert same(contents(first), contents(second)) and same(contents(first), contents(open_cache(tmp_path / "cache")))
    assert encoders._pipe is None, "encoders are freed"
    own = Encoders(saved_pipeline(family))
    for entry in first.entries:
        assert tuple(first.latents([entry]).shape) == (1, *own.latent_shape(entry.size))
        expected = collate(own.prompts([entry.caption]))
        for name, leaf in first.condition([entry]).items():
            torch.testing.assert_close(leaf, expected[name], rtol=1e-4, atol=1e-4)
    expected = collate([own.negative_prompt("bad")])
    assert first.uncond.keys() == expected.keys()
    for name, leaf in first.uncond.items():
        torch.testing.assert_close(leaf, expected[name], rtol=1e-4, atol=1e-4)


def test_only_what_changed_is_encoded(tmp_path):
    data, cache = digits(tmp_path / "data"), tmp_path / "cache"
    build(cache, data)
    (data / "0.txt").write_text("another caption")
    Image.fromarray(load_sample_images().images[0][:40, :40]).save(data / "1.png")
    (data / "2.png").unlink()
    shutil.copy(data / "3.png", data / "9.png")  # the same bytes
    (data / "9.txt").write_text("the digit 3, number 3")
    encoders = Counted()
    found = build(cache, data, encoders)
    assert encoders.encoded == {"images": 1, "prompts": ["another caption"]}
    assert [e.name for e in found.entries] == ["0.png", "1.png", "3.png", "4.png", "5.png", "9.png"]
    assert torch.equal(found.latents([found.entries[2]]), found.latents([found.entries[5]]))
    assert_close(contents(found), contents(build(tmp_path / "fresh", data)))
    other = Counted(dtype=torch.bfloat16)
    build(cache, data, other)
    assert other.encoded["images"] == 5 and len(other.encoded["prompts"]) == 6, "other encoders' encodings are others"


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "header"])
def test_a_damaged_shard_is_encoded_again(tmp_path, harm):
    data, cache = digits(tmp_path / "data"), tmp_path / "cache"
    expected = contents(build(cache, data))
    shards = sorted(cache.glob("shard-*"))
    assert len(shards) > 2
    for path in (shards[0], shards[-1]):
        whole = bytearray(path.read_bytes())
        if harm == "flip":
            whole[-5] ^= 1
        whole = {"truncate": whole[:-7], "empty": b"", "header": b"\xff" * 100}.get(harm, whole)
        path.write_bytes(whole)
    encoders = Counted()
    found = build(cache, data, encoders)
    assert same(contents(found), expected) and len(found.warnings) == 2
    assert 0 < encoders.encoded["images"] + len(encoders.encoded["prompts"]) < 13
    build(cache, data, Counted(loads=False))


def test_bad_images_are_all_listed(tmp_path):
    data = digits(tmp_path / "data")
    (data / "1.png").write_bytes(b"no image")
    (data / "4.png").write_bytes((data / "4.png").read_bytes()[:-40])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"skip_bad.*got 2 that are not: 1.png: not an image.*; 4.png: ."):
            build(tmp_path / "cache", data)
    found = build(tmp_path / "cache", data, Counted(loads=False), options=CacheOptions(skip_bad=True))
    assert [e.name for e in found.entries] == ["0.png", "2.png", "3.png", "5.png"] and [*found.skipped] == [
        "1.png",
        "4.png",
    ]
    for path in data.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="got 6 that are not"):
        build(tmp_path / "cache", data, options=CacheOptions(skip_bad=True))


def test_enlarged_images_are_warned_of(tmp_path):
    data = digits(tmp_path / "data", 2)
    encoders = Counted()
    found = build_cache(tmp_path / "cache", read_folder(data), encoders, buckets(64, encoders.multiple))
    assert found.warnings == (
        "2 of 2 images are enlarged more than 1.25 times, the most is 1.png, 2.0 times: a smaller resolution would fit "
        "them",
    )


def test_what_is_cut_away_is_told(tmp_path):
    data = digits(tmp_path / "data", 2)
    Image.new("RGB", (400, 40)).save(data / "0.png")
    expected = (
        "1 of 2 images lose more than 25% of their area at their edges, where they are cut to the aspect ratio that "
        "they are trained in, the most is 0.png, 82%"
    )
    assert build(tmp_path / "cache", data).warnings == (expected,)


@pytest.mark.parametrize("family, limit", [("sd3", 256), ("qwen_image", 1024), ("sana", 300)])
def test_captions_that_are_longer_than_the_encoder_reads_are_counted(tmp_path, family, limit):
    data, encoders = digits(tmp_path / "data", 3), Counted(family)
    counts = [encoders.unread_tokens(["cat " * words]) for words in (1, limit // 2, 3 * limit)]
    assert counts[0] == [0] and counts[2][0] >= 3 * limit - limit - 40, "few tokens a word"
    (data / "1.txt").write_text("cat " * 3 * limit)
    for _ in range(2):  # also where all is encoded
        (told,) = build(tmp_path / "cache", data, encoders).warnings
        assert told.startswith("1 of 3 captions are longer than the text encoder reads") and told.endswith("of 1.png")


def test_prompts_without_images(tmp_path):
    encoders = Counted("qwen_image")
    found = build_cache(tmp_path / "cache", PROMPTS[:2] * 2, encoders, buckets(32, encoders.multiple))
    assert encoders.encoded == {"images": 0, "prompts": ["", *PROMPTS[:2]]}
    latents = found.latents(found.entries[:3])
    assert latents.shape == (3, 16, 16, 16) and not latents.any() and latents.dtype == torch.float32
    assert found.condition(found.entries[:2])["prompt_lengths"].tolist()[0] < 23


def test_a_full_disk_leaves_a_cache_that_goes_on(tmp_path, monkeypatch):
    data, cache = digits(tmp_path / "data"), tmp_path / "cache"
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cache/shard-.* must have room for \d+ bytes, got No space left on device"
    ) as seen:
        build(cache, data)
    assert seen.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert not list(cache.glob(".*.partial")) and not Shards(cache, verify=True).damaged
    encoders = Counted()
    build(cache, data, encoders)
    assert encoders.encoded["images"] + len(encoders.encoded["prompts"]) < 13


def test_another_process_waits_and_ranks_read(tmp_path):
    data, cache = digits(tmp_path / "data", 2), tmp_path / "cache"
    cache.mkdir()
    said, done = [], threading.Event()

    def other():
        build(cache, data, progress=lambda what, *_: said.append(what))
        done.set()

    lock = acquire(cache / LOCK)
    try:
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.4)
        assert not done.is_set() and said == [f"waiting for process {os.getpid()} on {socket.gethostname()}"]
    finally:
        lock.release()
    thread.join(30)
    assert done.is_set()
    waited = []
    rank = build(cache, data, Counted(loads=False), main_process=False, wait=lambda: waited.append(1))
    assert waited == [1] and len(rank.entries) == 2
    (data / "0.txt").write_text("what the main process has not seen")
    with pytest.raises(ValueError, match="must have been built by the main process"):
        build(cache, data, main_process=False)


def test_kills_at_random_moments(tmp_path):
    data, cache = digits(tmp_path / "data", 12), tmp_path / "cache"
    options = CacheOptions(vae_batch=1, text_batch=1, shard_bytes=1)
    waits, held = torch.rand(3).tolist(), [0]
    saved_pipeline("sd3")
    for wait in waits:
        process = os.fork()
        if process == 0:
            torch.set_num_threads(1)
            build(cache, data, options=options)
            os._exit(0)
        time.sleep(0.1 + 0.5 * wait)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert not Shards(cache, verify=True).damaged
        held.append(len(list(cache.glob("shard-*"))))
    assert held == sorted(held), "what was written stays"
    encoders = Counted()
    found = build(cache, data, encoders)
    assert encoders.encoded["images"] + len(encoders.encoded["prompts"]) == 25 - held[-1]
    assert not list(cache.glob(".*.partial"))
    assert_close(contents(found), contents(build(tmp_path / "fresh", data)))


def test_held_out_entries_stay_when_others_come(tmp_path):
    data, cache = digits(tmp_path / "data", 40), tmp_path / "cache"
    train, out = held_out(build(cache, data).entries, 0.2)
    assert 2 <= len(out) <= 16 and len(train) + len(out) == 40
    shutil.copy(data / "0.png", data / "a.png")
    (data / "a.txt").write_text("new")
    (data / f"{Path(out[0].name).stem}.txt").write_text("another caption")
    more = held_out(build(cache, data).entries, 0.2)[1]
    assert {e.name for e in more} - {"a.png"} == {e.name for e in out}
    assert ("a.png" in {e.name for e in more}) == ("0.png" in {e.name for e in out})
    assert held_out(train, 0)[1] == []
    with pytest.raises(ValueError, match="share must be a number"):
        held_out(train, 1)


def test_what_cannot_be_built_or_opened(tmp_path):
    encoders = Counted()
    for items, sizes, match in (
        ([], [(32, 32)], "items must be images or prompts, got none"),
        (["x"], [(32, 34)], r"multiples of 4 px, got \(32, 34\)"),
        (["x"], [], "got none"),
    ):
        with pytest.raises(ValueError, match=match):
            build_cache(tmp_path, items, encoders, sizes)
    for text in (None, "[1]", "{}", '{"format": 1}', '{"format": 1, "entries": [{"x": 1}], "shapes": {}}', "{"):
        if text is not None:
            (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match="open_cache: folder must hold a cache"):
            open_cache(tmp_path)
    with pytest.raises(ValueError, match="Encoders: folder must hold a diffusers pipeline"):
        Encoders(tmp_path)
    with pytest.raises(ValueError, match="vae_batch must be an integer >= 1"):
        CacheOptions(vae_batch=0)
