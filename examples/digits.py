"""A one-step generator of handwritten digits, trained from nothing in a few minutes on a CPU.

The data are scikit-learn's 1,797 digits (8x8 pixels, in the package: nothing is downloaded). A small network first
learns plain flow matching: the base model, which needs many steps. TwinFlow then continues from its weights, and the
same network generates in 1, 2 or 4 steps. A table and a picture compare the two.

    python examples/digits.py                      # the published training code's recipe
    python examples/digits.py --recipe all_terms   # the paper's objective: nearer to the data, more work per step
    python examples/digits.py --full               # three times as many steps

All real images are used for training and for the distance, so a low distance says that the training set is reproduced
in distribution; it does not measure generalisation.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from digits_data import CLASSES, PIXELS, Data, DigitsNet, load_data
from digits_metrics import evaluate, half_against_half, results_table, save_picture
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.sampling import sample

BATCH = 128
GENERATED = 10_000
BASE_STEPS, BASE_LR = 6000, 2e-3
TWINFLOW_STEPS = {"partition": 3000, "all_terms": 1500}
TWINFLOW_LR = {"partition": 2e-3, "all_terms": 1e-3}
FULL = 3  # --full: this many times the steps
WARMUP_STEPS = 100

Report = Callable[[int, dict[str, Any]], None]
Row = dict[str, Any]


def averaged(student: nn.Module, teacher: EMATeacher) -> nn.Module:
    """The student with the teacher's averaged weights: the model one keeps."""
    model = copy.deepcopy(student)
    model.load_state_dict(teacher.parameters(), strict=False)
    return model.requires_grad_(False)


def fit(
    student: nn.Module,
    steps: int,
    lr: float,
    loss_of_step: Callable[[], tuple[torch.Tensor, dict[str, Any]]],
    report: Report,
    scheduled: bool = True,
) -> None:
    """Minimises a loss with AdamW: a short warm-up, then a linear decay to zero; or a constant rate."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for k in range(steps):
        factor = min(1.0, (k + 1) / WARMUP_STEPS) * (1 - k / steps) if scheduled else 1.0
        optimizer.param_groups[0]["lr"] = lr * factor
        loss, terms = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(k, terms)


def train_base(
    student: nn.Module, data: Data, steps: int, generator: torch.Generator, report: Report, lr: float = BASE_LR
) -> nn.Module:
    """Plain flow matching; returns the model with averaged weights."""
    average = EMATeacher(student, 0.998)

    def loss_of_step() -> tuple[torch.Tensor, dict[str, Any]]:
        average.update()
        x, label = _batch(data, generator)
        t, z = torch.rand(BATCH, generator=generator), torch.randn(x.shape, generator=generator)
        x_t = torch.lerp(x, z, t[:, None])
        loss = (student(x_t, t, t, label) - (z - x)).square().mean()
        return loss, {"velocity": loss.detach()}

    fit(student, steps, lr, loss_of_step, report)
    return averaged(student, average)


def train_twinflow(
    student: nn.Module,
    config: TwinFlowConfig,
    data: Data,
    steps: int,
    lr: float,
    generator: torch.Generator,
    report: Report,
    scheduled: bool = True,
) -> nn.Module:
    """TwinFlow from the student's weights; returns the model with averaged weights."""
    criterion, teacher = TwinFlowLoss(config), EMATeacher(student, 0.99)

    def loss_of_step() -> tuple[torch.Tensor, dict[str, Any]]:
        out = criterion(student, *_batch(data, generator), teacher=teacher, generator=generator)
        return out.loss, out.terms

    fit(student, steps, lr, loss_of_step, report, scheduled)
    teacher.update()
    return averaged(student, teacher)


def _batch(data: Data, generator: torch.Generator) -> Data:
    rows = torch.randint(len(data[0]), (BATCH,), generator=generator)
    return data[0][rows], data[1][rows]


def generate(model: nn.Module, steps: int, style: str, seed: int) -> Data:
    """GENERATED images, as many of each class, by the library's sampler; `mul` follows the base model's ODE."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(GENERATED) % CLASSES
    z = torch.randn(GENERATED, PIXELS, generator=generator)
    gap_end = 0.0 if style == "mul" else None
    return sample(model, z, label, steps=steps, style=style, gap_end=gap_end, generator=generator), label


@contextmanager
def progress_bar(console: Console, name: str, steps: int) -> Iterator[Report]:
    """A progress bar that shows the loss and its terms."""
    columns = (TextColumn("{task.description}"), BarColumn(12), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[terms]}"),
                  console=console) as progress:  # fmt: skip
        task = progress.add_task(name, total=steps, terms="")

        def report(k: int, terms: dict[str, Any]) -> None:
            if k % 20 == 19 or k + 1 == steps:
                shown = "  ".join(f"{term} {float(value):.3f}" for term, value in terms.items())
                progress.update(task, completed=k + 1, terms=shown)

        yield report


def compare(base: nn.Module, model: nn.Module, data: Data, seed: int) -> tuple[list[Row], dict[str, torch.Tensor]]:
    """The table's rows, and the picture's images by name."""
    queries = [("base", base, n, "mul") for n in (1, 2, 4, 50)]
    queries += [("TwinFlow", model, n, style) for style in ("few", "any") for n in (1, 2, 4)]
    rows, images = [], {}
    for name, network, steps, style in queries:
        generated, label = generate(network, steps, style, seed)
        rows.append({"model": name, "steps": steps, "style": style, **evaluate(generated, label, *data)})
        if style == "few" or (style == "mul" and steps in (1, 50)):
            images[f"{name}, {steps} step{'s' * (steps > 1)}"] = generated[:CLASSES]
    rows.append({"model": "real, half against half", "steps": None, "style": "", **half_against_half(*data)})
    first = [int((data[1] == digit).nonzero()[0]) for digit in range(CLASSES)]
    return rows, {"real": data[0][first], **images}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=sorted(TWINFLOW_STEPS), default="partition")
    parser.add_argument("--full", action="store_true", help=f"{FULL} times as many steps, in both trainings")
    parser.add_argument("--steps", type=int, help="TwinFlow steps (default: by recipe, about the same time)")
    parser.add_argument("--lr", type=float, help="TwinFlow's peak learning rate (default: by recipe)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("digits_out"), help="folder of the picture")
    parser.add_argument("--json", type=Path, help="file of the metrics (default: metrics.json in the folder)")
    return parser.parse_args()


def main() -> None:
    args, console, started = arguments(), Console(), time.perf_counter()
    times = FULL if args.full else 1
    base_steps, steps = BASE_STEPS * times, args.steps or TWINFLOW_STEPS[args.recipe] * times
    lr = args.lr or TWINFLOW_LR[args.recipe]
    config = TwinFlowConfig(recipe=args.recipe, enhanced_ratio=0.0)
    data = load_data()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    student = DigitsNet(data)
    with progress_bar(console, "flow matching", base_steps) as report:
        base = train_base(student, data, base_steps, generator, report)
    student.load_state_dict(base.state_dict())
    with progress_bar(console, f"TwinFlow, {args.recipe}", steps) as report:
        model = train_twinflow(student, config, data, steps, lr, generator, report)
    rows, images = compare(base, model, data, args.seed)
    seconds = time.perf_counter() - started
    console.print(results_table(rows, f"{GENERATED} generated digits against {len(data[0])} real ones"))
    args.out.mkdir(parents=True, exist_ok=True)
    save_picture(images, args.out / "digits.png")
    results = {
        "seed": args.seed, "base_steps": base_steps, "steps": steps, "lr": lr, "batch": BATCH,
        "seconds": seconds, "cpu_seconds": time.process_time(), "threads": torch.get_num_threads(),
        "config": config.to_dict(), "rows": rows,
    }  # fmt: skip
    path = args.json or args.out / "metrics.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"{seconds:.0f} s. Metrics: {path}. Picture: {args.out / 'digits.png'}")


if __name__ == "__main__":
    main()
