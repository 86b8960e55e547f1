"""A launcher's child: a step of a run, its state in a folder. It imports little, as every child has to."""

import sys
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator

from twinflow import Draws, TwinFlowConfig, TwinFlowLoss
from twinflow.distributed import any_rank, unwrap, world
from twinflow.interface import trained_parameters
from twinflow.train.checkpoint.checkpoint import write_checkpoint
from twinflow.train.checkpoint.run_state import RunState
from twinflow.train.config.resolve import read_config
from twinflow.train.model.parallel import clip, wrap
from twinflow.train.model.student import build_student


def step(pipeline: Path, folder: Path) -> None:
    """A step of four rows, all of them on one process or two on each of two."""
    accelerator, (rank, ranks) = Accelerator(cpu=True), world()
    given = {"pretrained_model_name_or_path": str(pipeline), "twinflow_enabled": True, "use_ema": True,
             "mixed_precision": "no", "lora_rank": 2}  # fmt: skip
    settings = read_config(None, given)
    model = build_student(settings, pipeline)
    student, teacher = wrap(settings, model, accelerator)
    trained = trained_parameters(unwrap(student))
    torch.manual_seed(3)
    x, criterion = torch.randn(4, 16, 8, 8), TwinFlowLoss(TwinFlowConfig(recipe="all_terms"))
    widths = model.condition_widths()
    prompt, pooled = torch.randn(4, 7, widths["prompt_embeds"]), torch.randn(4, widths["pooled_prompt_embeds"])
    draws, mine = criterion.draw(x), slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    own = {f.name: value if (value := getattr(draws, f.name)) is None else value[mine] for f in fields(Draws)}
    cond = {"prompt_embeds": prompt[mine], "pooled_prompt_embeds": pooled[mine]}
    criterion.backward(student, x[mine], cond, cond, teacher=teacher, draws=Draws(**own))
    norm = clip(trained.values(), 1.0)
    torch.optim.SGD(trained.values(), lr=0.1).step()
    flags = [any_rank(False), any_rank(rank == 1), any_rank(False)]
    extra = {"class": type(student).__name__, "agreed": flags, "norm": float(norm)}
    write_checkpoint(folder, 1, RunState(student, teacher, criterion, extra=extra).collect())


if __name__ == "__main__":
    torch.set_num_threads(1)
    step(Path(sys.argv[1]), Path(sys.argv[2]))
