"""Hashes the bits of every bench case's output: `cmp` of two runs' files shows that a process changes nothing.

python benchmarks/determinism.py [--device cpu] --out hashes.json
"""

import argparse
import hashlib
import json
from pathlib import Path

import harness
import torch
from torch.utils._pytree import tree_leaves


def bits(output: object) -> str:
    """A hash of the bytes of every tensor in a pytree."""
    found = hashlib.sha256()
    for x in tree_leaves(output):
        if isinstance(x, torch.Tensor):
            found.update(x.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    hashes = {}
    for op, cases in harness.bench_cases().items():
        for case in cases(torch.device(options.device)):
            first, again = (bits(case.run(harness.inputs_of(case, 0))) for _ in range(2))
            if first != again:
                raise SystemExit(f"{op}: {case.name}: two calls in one process differ")
            hashes[f"{op}: {case.name}"] = first
    options.out.write_text(json.dumps(hashes, indent=1) + "\n")
    print(f"{len(hashes)} cases: two calls gave the same bits")


if __name__ == "__main__":
    main()
