"""`run_call()`: one network call of a step."""

from contextlib import nullcontext
from typing import Any

import torch

from twinflow.interface import Student, Teacher, guidance_times
from twinflow.objective.passes import NetworkCall


def run_call(
    call: NetworkCall, student: Student, teacher: Teacher | None, x_t: torch.Tensor, times: torch.Tensor, cond: Any
) -> Any:
    """What a call's network answers.

    Args:
        call: the call; it says who is asked, and whether with gradient.
        student, teacher: the networks; the teacher is needed where it is asked.
        x_t: latents of the call's rows.
        times: t and r in the first two rows, (B,) each.
        cond: their condition.
    """
    t, r = times[0], times[1]
    if call.name == "cfg":
        t, r = guidance_times(student, t, r)
    network: Any = student
    more = {}
    if call.who == "teacher":
        assert teacher is not None
        network, more = teacher.velocity, {"query": "cfg" if call.name == "cfg" else "rollout"}
    grad = call.gradient and torch.is_grad_enabled()
    # Autocast would cache weights cast without a graph and hand them to the differentiated call.
    cached = nullcontext() if grad else _no_autocast_cache()
    with torch.set_grad_enabled(grad), cached:
        return network(x_t, t, r, cond, **more)


class _no_autocast_cache:
    """Autocast without its weight cache."""

    def __enter__(self) -> None:
        self._before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_cache_enabled(self._before)
