"""Tiny students for the tests of memory, how they are trained, and what is left behind."""

import gc

import torch
from helpers.family_batches import make_student
from torch.multiprocessing.reductions import StorageWeakRef

from twinflow.lora import add_lora

FAMILIES = ("qwen_image", "sd3", "sana", "flux", "z_image")
LEVELS = ("all", "products", "attention", "input")
OFFLOAD = dict(budget_gb=0.02, min_bytes=64, in_flight_bytes=256)


def student_of(family: str, lora: bool, seed: int = 0):
    torch.manual_seed(seed)
    student = make_student(family, conditioning=None if lora else "dual")
    return add_lora(student, rank=2, conditioning="dual+sign") if lora else student


def has_storage(x: torch.Tensor) -> bool:
    return x.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def live_storages(collect: bool = True) -> int:
    """How many there are; what other tests leave behind, sparse tensors and functorch's wrappers, have none."""
    if collect:
        gc.collect()
    plain = (x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))
    return len({StorageWeakRef(x.untyped_storage()).cdata for x in plain if has_storage(x)})


def fail_once(when: str):
    """A hook that fails in the first differentiated forward, or when that is recomputed."""
    seen = []

    def hook(module, args, output):
        if torch.is_grad_enabled():
            seen.append(1)
            if len(seen) == (1 if when == "forward" else 2):
                raise RuntimeError("broken")

    return hook
