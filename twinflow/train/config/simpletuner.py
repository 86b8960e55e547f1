"""`OPTIONS`: SimpleTuner's options that are none here: those to ignore, and those to refuse because they would matter.

simpletuner.json lists both: "ignored" names, which say how a trainer works and not what it trains; and "refused", what
to use instead ("": nothing) -> name -> values that ask for nothing, beside `NEUTRAL`. It has the names of its model
families that are refused, too.
"""

import json
from pathlib import Path
from typing import Any

from twinflow.errors import ArgumentError
from twinflow.train.config.option_types import shown

NEUTRAL = (None, False, 0, "", "none", "default", "no")  # as which every option is accepted
_TABLE = json.loads(Path(__file__).with_name("simpletuner.json").read_text(encoding="utf-8"))
IGNORED: tuple[str, ...] = tuple(_TABLE["ignored"])
# name -> (values that ask for nothing, what to use instead)
REFUSED: dict[str, tuple[list[Any], str]] = {
    name: (neutral, instead) for instead, names in _TABLE["refused"].items() for name, neutral in names.items()
}
OPTIONS = (*REFUSED, *IGNORED)
_IGNORED_PREFIXES = ("sdnq_",)  # how a base is packed, which `base_model_precision` asks for
# a model family that is not trained here -> why, or what to use
REFUSED_FAMILIES: dict[str, str] = {
    name: reason for reason, names in _TABLE["refused_families"].items() for name in names
}


def knows(name: str) -> bool:
    """Whether an option is one of SimpleTuner's."""
    return name in OPTIONS or name.startswith(_IGNORED_PREFIXES)


def prompt_library(path: Any) -> list[str]:
    """The prompts of a `user_prompt_library`, a JSON file of names and prompts.

    Raises:
        ArgumentError: there is no such file.
    """
    try:
        found = json.loads(Path(str(path)).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError("train", "user_prompt_library", "a JSON file", f"{path}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(prompt, str) for prompt in found.values()):
        raise ArgumentError("train", "user_prompt_library", "names and prompts", path, verb="hold")
    return list(found.values())


def refusal(name: str, value: Any) -> list[ValueError]:
    """What is wrong where a refused option would change something, and what to use instead; empty: nothing."""
    neutral, instead = REFUSED.get(name, ([], ""))
    plain = _plain(value)
    if name in REFUSED and plain not in ({}, [], ()) and plain not in (*NEUTRAL, *neutral):
        return [ArgumentError("train", name, "left out, as it is not supported", shown(value), instead)]
    return []


def _plain(value: Any) -> Any:
    """A text as what it says, `0` and `0.0` and `false` alike."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    try:
        return float(text)
    except ValueError:
        return {"false": False, "null": None}.get(text, text)
