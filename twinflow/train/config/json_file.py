"""`read_json()`: a config file as a mapping, or one line that says what is wrong with it and where."""

import json
from pathlib import Path
from typing import Any

_MOST_BYTES = 1_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of UTF-8 text, with a byte-order mark or without.

    Raises:
        ValueError: no such file, none that can be read, no JSON, no object, or a key that is there twice.
    """
    text = _text(path)
    try:
        found = json.loads(text, object_pairs_hook=lambda pairs: _once(path, pairs))
    except json.JSONDecodeError as error:
        where = f"{path} line {error.lineno} column {error.colno}"
        raise ValueError(f"train: config must be JSON, got {where}: {error.msg}{_hint(error)}") from None
    except RecursionError:
        raise ValueError(f"train: config must be JSON, got {path}, nested too deeply") from None
    except ValueError as error:
        if str(error).startswith("train: "):
            raise
        raise ValueError(f"train: config must be JSON, got {path} with an integer too long to read") from None
    if not isinstance(found, dict):
        raise ValueError(f"train: config must hold an object {{...}}, got {path} with a {type(found).__name__}")
    return found


def _text(path: Path) -> str:
    wanted = "train: config must be a JSON file"
    try:
        if path.is_dir():
            raise ValueError(f"{wanted}, got the folder {path}")
        if not path.is_file():
            raise ValueError(f"{wanted} that exists, got {str(path)!r}")
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{wanted} of at most {_MOST_BYTES} bytes, got {path} with {path.stat().st_size}")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{wanted} that can be read, got {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{wanted} in UTF-8, got {path} with byte {error.start} of another encoding") from None


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"train: {twice!r} must be given once, got it twice in {path}")
    return found


def _hint(error: json.JSONDecodeError) -> str:
    """What JSON lacks and other formats have, where that is what stands there."""
    here, before = error.doc[error.pos :].lstrip(), error.doc[: error.pos].rstrip()
    if not error.doc.strip():
        return " (the file is empty)"
    if here[:2] in ("//", "/*") or here[:1] == "#":
        return " (JSON has no comments)"
    if (here[:1] in ("}", "]") and before.endswith(",")) or (here[:1] == "," and here[1:].lstrip()[:1] in ("}", "]")):
        return " (JSON has no comma after the last entry)"
    return " (JSON has double quotes only)" if here[:1] == "'" else ""
