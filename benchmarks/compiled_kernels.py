"""What the machine code of the Triton kernels lets one expect of a GPU; compiled here, run nowhere.

    python benchmarks/compiled_kernels.py

The share of copy bandwidth is an expectation, not a measurement: 0.95 for 16-byte accesses, times 0.9 where a block
exchanges through shared memory (Triton changes the layout between 16-bit loads and float32 stores), times 0.85 more
where it does so in its loop, and no more than the bytes in flight give: resident threads times bytes loaded by each,
over the bytes that hide a memory's latency. Writes benchmarks/results/compiled_kernels.{json,md}.
"""

import json
from pathlib import Path
from typing import Any

import aot
import aot_calls
import machine_code
import triton
import triton.language as tl

RESULT = Path(__file__).resolve().parent / "results" / "compiled_kernels.json"
IN_FLIGHT = {80: 13e3, 90: 24e3}  # bytes an SM: 1.9 and 3.3 TB/s over 108 and 132 SMs, 700 and 950 ns


@triton.jit
def _copy_kernel(x_ptr, y_ptr, row_size, BLOCK: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.load(x_ptr + columns, mask=columns < row_size), mask=columns < row_size)


COPY = aot.Launch(
    kernel="_copy_kernel",
    types=(("x_ptr", "*fp32"), ("y_ptr", "*fp32"), ("row_size", "i32"), ("BLOCK", "constexpr")),
    constants=(("BLOCK", 1024),),
    aligned=("x_ptr", "y_ptr", "row_size"),
    options=(("num_warps", 4), ("enable_fp_fusion", False)),
)


def shown(launches: dict[str, list[aot.Launch]]) -> list[aot.Launch]:
    """The variants of the table: aligned, of the float32, bfloat16 and float16 kinds, one of each combination."""
    found = {}
    for name in sorted(launches):
        for launch in launches[name]:
            if launch.whole_accesses and "fp64" not in dtypes(launch) and name != "_row_loss_kernel":
                found.setdefault((name, dtypes(launch)), launch)
    return list(found.values())


def dtypes(launch: aot.Launch) -> str:
    """The types of its tensors, in order."""
    constants = dict(launch.constants)
    if "ALIGNED" in constants:
        names = [constants["T"], constants["S"], *([constants["C"]] if constants["HAS_COPY"] else [])]
        return ", ".join(str(name) for name in names)
    return ", ".join(kind.removeprefix("*") for _, kind in launch.types if kind.startswith("*"))


def expected_share(code: machine_code.Code, threads: int, capability: int) -> float:
    """The share of copy bandwidth to be expected, in (0, 1]."""
    loaded = sum(width * count for width, count in code.loads.items())
    flying = code.occupancy(threads, capability) * machine_code.THREADS * loaded
    share = 0.95 * (0.9 if code.exchanges else 1.0) * (0.85 if code.exchanges and code.loop else 1.0)
    return min(share, flying / IN_FLIGHT[capability])


def instructions_a_byte(code: machine_code.Code) -> float:
    """Instructions of a thread over the bytes that it loads and stores."""
    moved = sum(width * count for found in (code.loads, code.stores) for width, count in found.items())
    return code.instructions / moved


def cell(launch: aot.Launch, kernel: Any) -> dict[str, Any]:
    """What the table says of a variant."""
    (copy,) = machine_code.read(aot.compile_launch(COPY, _copy_kernel, 90)).values()
    codes = {}
    for capability in IN_FLIGHT:
        (codes[capability],) = machine_code.read(aot.compile_launch(launch, kernel, capability)).values()
    code = codes[90]
    found: dict[str, Any] = {"kernel": launch.kernel, "dtypes": dtypes(launch), "exchanges": code.exchanges["BAR"]}
    found |= {"loop": code.loop, "instructions": instructions_a_byte(code) / instructions_a_byte(copy)}
    for capability, of in codes.items():
        found[f"registers_{capability}"] = of.registers
        found[f"occupancy_{capability}"] = of.occupancy(launch.threads, capability)
        found[f"share_{capability}"] = expected_share(of, launch.threads, capability)
    return found


def table(cells: list[dict[str, Any]]) -> str:
    """A line per variant."""
    lines = [
        "| kernel | tensors | registers | threads resident | barriers | instructions, of a copy's | copy's bandwidth |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in cells:
        where = f"{c['exchanges']}{' in its loop' if c['loop'] and c['exchanges'] else ''}"
        lines.append(
            f"| `{c['kernel'].strip('_')}` | {c['dtypes']} | {c['registers_80']}, {c['registers_90']} | "
            f"{c['occupancy_80']:.0%}, {c['occupancy_90']:.0%} | {where} | {c['instructions']:.1f} | "
            f"{c['share_80']:.0%}, {c['share_90']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table and writes it."""
    kernels = aot.kernels()
    cells = [cell(launch, kernels[launch.kernel]) for launch in shown(aot.record(aot_calls.CALLS))]
    text = f"Triton {triton.__version__}, sm_80 and sm_90.\n\n{table(cells)}\n"
    print(text)
    RESULT.write_text(json.dumps({"triton": triton.__version__, "cells": cells}, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
