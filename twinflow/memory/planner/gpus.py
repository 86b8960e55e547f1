"""`GPUS`: the cards that forecasts are made for."""

from dataclasses import dataclass

from twinflow.suggest import lookup

CONTEXT_BYTES = 500_000_000  # CUDA's context and loaded kernels, outside the allocator


@dataclass(frozen=True)
class GPU:
    """A card, by its maker's data sheet.

    Args:
        name: as on the command line.
        usable_gb: GB that the allocator can hand out, 1 GB = 1e9 bytes: what torch reports less the CUDA context.
        half_tflops, float_tflops: dense matrix products in bf16, and in float32 without TF32; TFLOP/s.
        memory_gb_s: bandwidth of its memory.
        host_gb_s: of pinned copies from or to the host, one way.
    """

    name: str
    usable_gb: float
    half_tflops: float
    float_tflops: float
    memory_gb_s: float
    host_gb_s: float


#        name          usable GB  bf16    fp32   memory   host
_TABLE = (
    ("a100-40gb",      42.0,      312,    19.5,  1555,    25),
    ("a100-80gb",      84.5,      312,    19.5,  2039,    25),
    ("h100",           84.5,      989,    67.0,  3350,    50),
    ("h200",           150.0,     989,    67.0,  4800,    50),
    ("rtx-5080",       16.4,      112,    56.3,  960,     50),
    ("rtx-4090",       25.0,      165,    82.6,  1008,    25),
    ("rtx-5090",       33.3,      210,    105,   1792,    50),
)  # fmt: skip
GPUS = {row[0]: GPU(*row) for row in _TABLE}


def gpu_of(name: str) -> GPU:
    """A card by its name.

    Raises:
        ValueError: unknown; the message has the nearest names.
    """
    return lookup(GPUS, name, "plan", "gpu", hint="or give memory_gb")
