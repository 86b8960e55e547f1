"""`pytest benchmarks --benchmark-only`: every kernel case through the harness, writing the JSON of the bench files.

pytest-benchmark's own table times the operation alone; the comparison with peers is the harness's.
"""

import itertools
from collections.abc import Iterator

import harness
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [(stem, case) for stem, cases in harness.bench_cases().items() for case in cases(DEVICE)]


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, list]]:
    """Results by stem; written when all cases of a stem have run."""
    found: dict[str, list] = {stem: [] for stem, _ in CASES}
    yield found
    for stem, measured in found.items():
        if len(measured) == sum(name == stem for name, _ in CASES):
            print(f"\n{harness.table(measured)}\nwritten: {harness.write(stem, measured, DEVICE)}")


@pytest.mark.parametrize("stem, case", [pytest.param(s, c, id=f"{s}: {c.name}") for s, c in CASES])
def test_kernel(stem, case, results, benchmark):
    result = harness.measure(case, DEVICE)
    results[stem].append(result)
    benchmark.extra_info["harness"] = result
    sets = itertools.cycle(harness.input_sets(case, 2, harness.environment.cache_bytes(DEVICE)))

    def run(inputs):
        case.run(inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=lambda: ((next(sets),), {}), rounds=20, warmup_rounds=2)
