"""The prompts of samples, given or taken from the data, and what is encoded of them."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.cache_cases import Counted
from helpers.validation_cases import CPU, PROMPTS, data_of, prompts_of, settings_for

from twinflow.train.data.prepare import encoders_of, prepare_data
from twinflow.train.validation.prompts import captions, require_resolution, validation_prompts


class Captions:
    """Entries with nothing but captions."""

    def __init__(self, *words: str) -> None:
        self.entries = [type("Entry", (), {"caption": text}) for text in words]


def test_up_to_four_captions_that_differ_whatever_their_order():
    words = [f"number {k}" for k in range(9)]
    chosen = captions(Captions(*words, *words))
    assert len({*chosen}) == 4 and captions(Captions(*reversed(words))) == chosen
    assert captions(Captions("b", "", "a", " ")) == [*captions(Captions("a", "b")), *captions(Captions("", " "))]
    assert captions(Captions("", "")) == [""]
    fewer = captions(Captions(*(text for text in words if text != chosen[0])))
    assert fewer[:3] == chosen[1:]


def test_conditions_are_the_encoders_own(tmp_path):
    """Of prompts that are given, repeated ones too, and of the negative prompt, at the size of the images."""
    settings = settings_for(tmp_path, validation_prompts=[*PROMPTS, PROMPTS[0]], validation_negative_prompt="blurred")
    prompts = prompts_of(settings)
    encoders = encoders_of(settings, Path(settings.pretrained_model_name_or_path), CPU)
    assert prompts.texts == (*PROMPTS, PROMPTS[0])
    assert prompts.size == (32, 48) and prompts.latent_shape == (16, 16, 24)
    for words, cond in zip((*prompts.texts, "blurred"), (*prompts.conditions, prompts.negative), strict=True):
        (expected,) = encoders.prompts([words])
        assert cond.keys() == expected.keys()
        for name, leaf in expected.items():
            torch.testing.assert_close(cond[name], leaf[None], rtol=1e-4, atol=1e-4)
    assert not torch.equal(prompts.negative["prompt_embeds"], prompts.conditions[0]["prompt_embeds"])


def test_encoders_are_loaded_once_for_data_and_prompts(tmp_path, monkeypatch):
    settings = settings_for(tmp_path, validation_prompts=[])
    cache = data_of(settings)
    encoders, loaded = Counted("sd3"), []
    load = DiffusionPipeline.from_pretrained
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *a, **k: loaded.append(1) or load(*a, **k))
    fresh = settings_for(tmp_path, validation_prompts=[], cache_dir=str(tmp_path / "other"))
    with encoders.kept():
        prepare_data(fresh, encoders, progress=lambda what, done, of: None)
        prompts = validation_prompts(fresh, cache, encoders)
        assert encoders._pipe is not None
    assert len(loaded) == 1 and encoders._pipe is None
    assert list(prompts.texts) == captions(cache) and len(prompts.texts) == 4
    again = Counted("sd3", loads=False)
    assert validation_prompts(fresh, cache, again).texts == prompts.texts and not again.encoded["prompts"]


def test_a_size_that_the_model_does_not_take(tmp_path):
    settings = settings_for(tmp_path, "sana", validation_resolution="101x64")
    encoders = encoders_of(settings, Path(settings.pretrained_model_name_or_path), CPU)
    message = r"train: validation_resolution must be a multiple of \d+ pixels \(such as 104x64\), got 101x64"
    with pytest.raises(ValueError, match=message):
        require_resolution(settings, encoders)
    with pytest.raises(ValueError, match=message):
        validation_prompts(settings, None, encoders)
    assert not settings.cache_dir.exists()
