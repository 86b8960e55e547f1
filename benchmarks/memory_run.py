"""Training steps of one configuration in a process of its own: their peak memory and seconds, as a line of JSON.

    python benchmarks/memory_run.py --model qwen-image --run 80gb [--batch 4] [--depth 6] [--cap-gb 84.5]

Before it stands what `apply_memory` logs. Running out of device memory is an outcome like another; any other error
ends the process.
"""

import argparse
import gc
import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import environment
import networks
import torch
from harness import quantiles
from torch import nn

from twinflow import EMATeacher, TwinFlowLoss
from twinflow.memory import PRESETS, apply_memory
from twinflow.memory.adamw_8bit import adamw_8bit
from twinflow.memory.planner.simulation.fused_attention import replaced
from twinflow.memory.planner.simulation.run import WORST_LAST
from twinflow.memory.planner.workload import Workload
from twinflow.models import FlowModel
from twinflow.objective.draws import Draws, draw_step

PUBLISHED = "published"  # the published schedule on the whole batch, every block under gradient checkpointing
OUT_OF_MEMORY = "out of memory"
MEASURED = "measured"
_NOISE = 1_000_003  # values; a prime, so that rows of no width begin alike


@dataclass(frozen=True)
class Configuration:
    """What is run.

    Args:
        model: one of `networks.NETWORKS`.
        run: a memory preset's name, `auto` for the best within `cap_gb`, or `published`.
        recipe, batch: of the objective, and the logical batch.
        depth: number of blocks; None: all.
        cap_gb: GB (1e9 bytes) beyond which the allocator refuses; None: what the card has.
    """

    model: str
    run: str
    recipe: str = "partition"
    batch: int = 4
    depth: int | None = None
    cap_gb: float | None = None

    @property
    def workload(self) -> Workload:
        """As the planner takes it."""
        return networks.workload(self.model, self.depth, recipe=self.recipe, batch=self.batch)

    def arguments(self) -> list[str]:
        """For this file's command line."""
        given = {name.replace("_", "-"): value for name, value in vars(self).items() if value is not None}
        return [part for name, value in given.items() for part in (f"--{name}", str(value))]


class Training:
    """A configuration's networks, optimizer and steps.

    Args:
        configuration: what is run.
        device: where.

    Attributes:
        preset: the memory preset at work; None: the published schedule.
    """

    def __init__(self, configuration: Configuration, device: torch.device) -> None:
        asked, self.device = configuration.workload, device
        published = configuration.run == PUBLISHED
        dtype = torch.float32 if asked.base == "float32" else torch.bfloat16
        student = _built(configuration, device, dtype)
        self.preset = None
        if not published:
            self.preset = apply_memory(student, configuration.run, device=device, **_for_auto(configuration)).preset
        self.student, self.teacher = student, EMATeacher(student, 0.99)
        trained = [p for p in student.parameters() if p.requires_grad]
        in_8_bit = self.preset is not None and self.preset.optimizer == "adamw8bit"
        self.optimizer = adamw_8bit(trained, 1e-5) if in_8_bit else torch.optim.AdamW(trained, 1e-5, fused=True)
        if asked.base == "float32":
            for network in (student, self.teacher.module):
                _autocast(network, device)
        self.inputs = networks.random_batch(configuration.model, student, asked.batch, device, torch.bfloat16)
        self.criterion = TwinFlowLoss(asked.config)
        self._generator = torch.Generator(device).manual_seed(1)

    def draws(self, k: int) -> Draws:
        """Of the k-th step: roles in turn, the row with most to hold last, where the planner has it too."""
        latents, roles = self.inputs[0], None
        if self.criterion.config.recipe == "partition":
            rows = len(latents)
            roles = tuple(WORST_LAST[(i - rows) % len(WORST_LAST)] for i in range(rows))
        return draw_step(self.criterion.config, latents, roles, self._generator, k * len(latents))

    def step(self, k: int) -> torch.Tensor:
        """One whole step; its loss."""
        arguments = dict(teacher=self.teacher, draws=self.draws(k))
        micro_batch = None if self.preset is None else self.preset.micro_batch
        if micro_batch is not None:
            loss = self.criterion.backward(self.student, *self.inputs, micro_batch=micro_batch, **arguments).loss
        else:
            schedule = PUBLISHED if self.preset is None else "planned"
            loss = self.criterion(self.student, *self.inputs, schedule=schedule, **arguments).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _built(configuration: Configuration, device: torch.device, dtype: torch.dtype) -> FlowModel:
    """On the device; or on the host, from where `apply_memory` moves it, where it may not fit as it is loaded."""
    preset, published = PRESETS.get(configuration.run), configuration.run == PUBLISHED
    on_host = configuration.run == "auto" or (preset is not None and (preset.defer or preset.base is not None))
    with replaced(nn.Linear, "reset_parameters", lambda own: _fill) if on_host else nullcontext():
        where = torch.device("cpu") if on_host else device
        return networks.build(configuration.model, where, dtype, configuration.depth, checkpointing=published)


def _fill(layer: nn.Linear) -> None:
    """Weights as a linear layer has them by default, but some noise over and over: a host takes minutes for more."""
    with torch.no_grad():
        noise = torch.rand(_NOISE, dtype=torch.float32, device=layer.weight.device) * 2 - 1
        scaled = (noise / layer.in_features**0.5).to(layer.weight.dtype)
        for parameter in layer.parameters():
            for part in parameter.view(-1).split(_NOISE):
                part.copy_(scaled[: len(part)])


def _for_auto(configuration: Configuration) -> dict[str, Any]:
    """What `auto` must be told; other presets take nothing."""
    if configuration.run != "auto":
        return {}
    asked = configuration.workload
    told = dict(batch=asked.batch, recipe=asked.recipe, text_tokens=asked.tokens)
    return {"memory_gb": configuration.cap_gb, **told}


def _autocast(network: nn.Module, device: torch.device) -> None:
    """Every call in an autocast context of its own, as accelerate does it."""
    network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)  # type: ignore[method-assign]


def cap(device: torch.device, cap_gb: float | None) -> None:
    """Makes the allocator refuse more than that, GB (1e9 bytes), in this process."""
    if cap_gb is None or device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(cap_gb * 1e9 / total, 1.0), device.index)


def _peak_on_cpu(training: Training) -> int | None:
    """The storages of all tensors that Python holds, and what a step adds."""
    if training.preset is not None and training.preset.offload_gb:
        return None
    added = environment.peak_bytes(lambda: training.step(0), training.device)
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return None if added is None else sum(storages.values()) + added


def measure(configuration: Configuration, device: torch.device, steps: int, warm_up: int = 3) -> dict[str, Any]:
    """Runs the steps: peak bytes allocated and reserved, quantiles of the seconds, and whether losses are finite.

    On a CPU the peak is what tensors take before a step and what the step adds; None where activations are offloaded,
    as they move to the same memory.
    """
    cap(device, configuration.cap_gb)
    training = Training(configuration, device)
    for k in range(warm_up):
        training.step(k)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    timed = [environment.timed(lambda k=k: training.step(k), device) for k in range(warm_up, warm_up + steps)]
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    else:
        peak, reserved = _peak_on_cpu(training), None
    seconds = [taken for taken, _ in timed]
    p10, median, p90 = quantiles(seconds) if steps > 1 else 3 * seconds
    return {
        "outcome": MEASURED, "preset": None if training.preset is None else str(training.preset), "steps": steps,
        "peak_bytes": peak, "reserved_bytes": reserved, "median_s": median, "p10_s": p10, "p90_s": p90,
        "finite": all(bool(torch.isfinite(loss)) for _, loss in timed),
    }  # fmt: skip


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(networks.NETWORKS), required=True)
    parser.add_argument("--run", required=True, help="a memory preset, auto or published")
    parser.add_argument("--recipe", default="partition")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--depth", type=int, help="blocks of the model (default: all)")
    parser.add_argument("--cap-gb", type=float, help="GB (1e9 bytes) beyond which the allocator refuses")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after three others")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = vars(parser.parse_args())
    device, steps = torch.device(options.pop("device")), options.pop("steps")
    try:
        found = measure(Configuration(**options), device, steps)
    except torch.OutOfMemoryError as error:
        found = {"outcome": OUT_OF_MEMORY, "message": str(error).splitlines()[0]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
