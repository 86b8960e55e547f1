"""`append_records()`, `each_line()`: `metrics.jsonl`, a record a line, read whatever a killed process left of it."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twinflow.atomic_files import write_file

_NUMBERS = ("seconds", "loss", "grad_norm", "learning_rate", "s_per_step", "rows_per_s", "peak_gb")
KINDS = ("start", "step", "evaluation")


def append_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds records, as lines of strict JSON, in one write; floats that are not finite become null.

    A line that a killed process left unfinished is ended first: it stays one damaged line.

    Args:
        path: of the file; its folder is made with the first record.
        records: in order, see `RunFolder`.

    Raises:
        OSError: no room for them.
    """
    if not records:
        return
    lines = [json.dumps(_strict(record), allow_nan=False, separators=(",", ":")) + "\n" for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        torn = file.seek(0, os.SEEK_END) > 0
        if torn:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(("\n" * torn + "".join(lines)).encode())


def each_line(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a `metrics.jsonl` one after the other, and the record of each; None: the line is damaged.

    A record has its kind and step; of what else `RunFolder` names, whatever is there has the right type.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield line, _record(line)


def keep_until(path: Path, step: int) -> int:
    """Takes out what was measured after a step, and damaged lines; the file is whole at every moment.

    Args:
        path: of a `metrics.jsonl`; one that is not there stays so.
        step: the last to keep: of the checkpoint that a run goes on from.

    Returns:
        Lines taken out.

    Raises:
        OSError: no room for the shorter file; the old one is as it was.
    """
    gone = sum(_goes(record, step) for _, record in each_line(path))
    if not gone:
        return 0
    kept = (line.rstrip(b"\r\n") + b"\n" for line, record in each_line(path) if not _goes(record, step))
    write_file(path, kept)
    return gone


def _goes(record: dict[str, Any] | None, step: int) -> bool:
    return record is None or record["step"] > step


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _strict(part) for name, part in value.items()}
    return [_strict(part) for part in value] if isinstance(value, list | tuple) else value


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and _is_whole(found) else None


def _refuse(name: str) -> None:
    raise ValueError(name)


def _is_whole(record: dict[str, Any]) -> bool:
    step, terms, pairs = record.get("step"), record.get("terms", {}), record.get("trajectory", [])
    return (
        record.get("kind") in KINDS
        and type(step) is int
        and 0 <= step < 2**53
        and all(record.get(name) is None or _is_number(record[name]) for name in _NUMBERS)
        and isinstance(terms, dict)
        and all(value is None or _is_number(value) for value in terms.values())
        and isinstance(pairs, list)
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in pairs)
    )


def _is_number(value: object) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**53)
