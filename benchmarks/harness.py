"""Times an operation beside its peers: checked first, cold buffers, interleaved, in one process.

A file `bench_<op>.py` defines `cases(device) -> list[Case]` and ends with `main(cases, "<op>")`:

    python benchmarks/bench_rollout_step.py [--device cpu] [--seconds 2] [--only TEXT]

Every round runs each contestant once (ours, every peer, a plain copy), in an order that moves on by one, on the input
set that was touched longest ago; so drift of the machine meets all of them alike. `ratio` is the median over rounds of
the peer's time over ours within the round. GPU times are CUDA events; CPU times are wall clock.
"""

import argparse
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import environment
import torch
from torch.utils._pytree import tree_leaves

OURS = "twinflow"
MAX_SETS = 256
MIN_ROUNDS, MAX_ROUNDS = 7, 500


class CheckFailed(AssertionError):
    """An operation's output differs from its reference: it is not timed."""


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Args:
        name: for the table, e.g. `(8, 16, 128, 128) bf16 into fp32`.
        make_inputs: i -> the i-th input set, any pytree of tensors; called after `torch.manual_seed(i)`, so that two
            calls with one i give equal values.
        run: inputs -> output (a pytree of tensors); for an in-place operation return what it wrote.
        reference: inputs -> the right output; run on an input set of its own.
        bytes_moved: what the operation has to read and write at least.
        peers: name -> callable like `run`; checked like it.
        rtol, atol: of `torch.testing.assert_close`; None for its defaults by dtype.
    """

    name: str
    make_inputs: Callable[[int], Any]
    run: Callable[[Any], Any]
    reference: Callable[[Any], Any]
    bytes_moved: int
    peers: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    rtol: float | None = None
    atol: float | None = None


def bench_cases() -> dict[str, Callable[[torch.device], Iterable[Case]]]:
    """Operation -> `cases` of every bench_<op>.py beside this file."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    return {stem.removeprefix("bench_"): importlib.import_module(stem).cases for stem in stems}


def inputs_of(case: Case, i: int) -> Any:
    """The i-th input set, the same values for the same i."""
    torch.manual_seed(i)
    return case.make_inputs(i)


def check(case: Case, name: str, run: Callable[[Any], Any]) -> None:
    """Raises CheckFailed unless `run` gives the reference's output, from equal inputs."""
    expected, actual = case.reference(inputs_of(case, 0)), run(inputs_of(case, 0))
    try:
        torch.testing.assert_close(actual, expected, rtol=case.rtol, atol=case.atol)
    except AssertionError as error:
        raise CheckFailed(f"{case.name}: {name} is not timed, its output is wrong: {error}") from None


def input_sets(case: Case, contestants: int, cache: int) -> list[Any]:
    """Enough input sets that one comes round again only when twice the cache has been touched since."""
    first = inputs_of(case, 0)
    size = max(1, sum(x.numel() * x.element_size() for x in tree_leaves(first) if isinstance(x, torch.Tensor)))
    count = min(MAX_SETS, max(2, contestants, 2 * cache // size + 2))
    return [first, *(inputs_of(case, i) for i in range(1, count))]


def _time_us(run: Callable[[Any], Any], inputs: Any, flush: torch.Tensor | None) -> float:
    if flush is not None:
        flush.zero_()  # empties L2, and lets the host run ahead of the device
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(inputs)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3
    start = time.perf_counter_ns()
    result = run(inputs)
    elapsed = (time.perf_counter_ns() - start) / 1e3
    del result  # freeing is not timed
    return elapsed


def copy_bytes(case: Case, device: torch.device) -> int:
    """What the plain copy moves: as much as the case, but past the cache, and at most 1 GB."""
    return min(max(case.bytes_moved, 4 * environment.cache_bytes(device), 1 << 26), 1 << 30)


def _copy_pairs(case: Case, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    size = copy_bytes(case, device) // 2
    return [tuple(torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2)) for _ in range(2)]


def _rounds(case: Case, runs: dict[str, Callable], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Times every contestant once a round until `seconds` are over; the plain copy is the contestant `copy`."""
    cache = environment.cache_bytes(device)
    flush = torch.empty(2 * cache, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    sets = {OURS: input_sets(case, len(runs), cache), "copy": _copy_pairs(case, device)}
    runs = {**runs, "copy": lambda pair: pair[1].copy_(pair[0])}
    names, times = list(runs), {name: [] for name in runs}
    turn, deadline, warm_up = {OURS: 0, "copy": 0}, 0.0, 2
    gc.collect()
    gc.disable()
    try:
        for index in range(-warm_up, MAX_ROUNDS):
            deadline = deadline if index > 0 else time.perf_counter() + seconds
            if index >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for name in names[index % len(names) :] + names[: index % len(names)]:
                kind = "copy" if name == "copy" else OURS
                inputs = sets[kind][turn[kind] % len(sets[kind])]
                turn[kind] += 1
                time_us = _time_us(runs[name], inputs, flush)
                if index >= 0:
                    times[name].append(time_us)
    finally:
        gc.enable()
    return times


def measure(case: Case, device: torch.device, seconds: float = 2.0) -> dict[str, Any]:
    """Checks and times one case.

    Args:
        case: what to time; its tensors live on `device`.
        device: decides the clock and the cache.
        seconds: how long the rounds go on (at least 7 rounds).

    Returns:
        The case's part of the JSON: per contestant median_us, p10_us, p90_us, gb_per_s, percent_of_copy, ratio with
        its p10 and p90, launches and peak_bytes.

    Raises:
        CheckFailed: an output is wrong.
    """
    runs = {OURS: case.run, **case.peers}
    for name, run in runs.items():
        check(case, name, run)
    times = _rounds(case, runs, device, seconds)
    copy_gb_per_s = copy_bytes(case, device) / statistics.median(times.pop("copy")) / 1e3
    contestants = {}
    for name, run in runs.items():
        low, median, high = quantiles(times[name])
        ratio_low, ratio, ratio_high = quantiles([a / b for a, b in zip(times[name], times[OURS], strict=True)])
        once = inputs_of(case, 0)
        gb_per_s = case.bytes_moved / median / 1e3
        contestants[name] = {
            "median_us": median, "p10_us": low, "p90_us": high, "best_us": min(times[name]), "gb_per_s": gb_per_s,
            "percent_of_copy": 100 * gb_per_s / copy_gb_per_s,
            "ratio": ratio, "ratio_p10": ratio_low, "ratio_p90": ratio_high,
            "best_ratio": min(times[name]) / min(times[OURS]),
            "launches": environment.launches(lambda run=run, once=once: run(once), device),
            "peak_bytes": environment.peak_bytes(lambda run=run, once=once: run(once), device),
        }  # fmt: skip
    rounds = len(times[OURS])
    return {"name": case.name, "bytes_moved": case.bytes_moved, "copy_gb_per_s": copy_gb_per_s, "rounds": rounds,
            "contestants": contestants}  # fmt: skip


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 10th percentile, median and 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], statistics.median(values), tenths[8]


def write(stem: str, results: list[dict[str, Any]], device: torch.device, folder: Path | None = None) -> Path:
    """Writes `<stem>_<device slug>.json` under benchmarks/results/ and returns its path."""
    folder = folder or environment.ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}_{environment.device_slug(device)}.json"
    path.write_text(json.dumps({"machine": environment.describe(device), "cases": results}, indent=1) + "\n")
    return path


def table(results: list[dict[str, Any]]) -> str:
    """The results as an aligned table, one line per case and contestant."""
    rows = [("case", "", "median us", "p10", "p90", "GB/s", "% of copy", "time / ours", "best", "launches", "peak MB")]
    for result in results:
        for name, c in result["contestants"].items():
            ratio = "" if name == OURS else f"{c['ratio']:.2f} ({c['ratio_p10']:.2f}-{c['ratio_p90']:.2f})"
            best = "" if name == OURS else f"{c['best_ratio']:.2f}"
            launches = "" if c["launches"] is None else str(c["launches"])
            peak = "" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 1e6:.1f}"
            times = (f"{c['median_us']:.1f}", f"{c['p10_us']:.1f}", f"{c['p90_us']:.1f}", f"{c['gb_per_s']:.1f}")
            rows.append((result["name"], name, *times, f"{c['percent_of_copy']:.0f}", ratio, best, launches, peak))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> str:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def main(cases: Callable[[torch.device], list[Case]], stem: str) -> None:
    """Measures every case of a bench file, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=f"times {stem}; writes benchmarks/results/{stem}_<device>.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    parser.add_argument("--only", default="", help="cases whose name contains this; nothing is written")
    options = parser.parse_args()
    device = torch.device(options.device)
    load = os.getloadavg()[0]
    print(f"{stem} on {environment.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if device.type == "cpu" and load > 0.5:
        print(f"load average {load:.1f} before the start: other work disturbs the times, repeat when it is quiet")
    results = [measure(case, device, options.seconds) for case in cases(device) if options.only in case.name]
    print(table(results))
    if results and not options.only:
        print(f"written: {write(stem, results, device).relative_to(environment.ROOT)}")
    sys.exit(0 if results else f"{stem}: --only {options.only!r} matches no case")
