"""Which conditioning a LoRA learns best with: every mode, same budget, on digits with a small SD3 transformer.

A plain flow-matching model is trained once. From it every mode gets a LoRA with each learning rate on a seed of its
own; the rate of the lowest score then runs on the reported seeds. Finished runs are kept: the same command resumes.

`python benchmarks/conditioning.py [--quick] [--objectives ...] [--seeds N] [--workers N]`
"""

import argparse
import copy
import functools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from digits_runs import QUERIES, ROOT, by_query, digits, digits_metrics, mean_and_spread, save
from report import table as markdown
from torch import nn

from twinflow import EMATeacher, TwinFlowConfig, TwinFlowLoss
from twinflow.conditioning import MODES
from twinflow.interface import Student
from twinflow.lora import add_lora
from twinflow.models import load
from twinflow.sampling import sample

Cell = dict[str, Any]
Cond = dict[str, torch.Tensor]

VARIANTS = [(mode, cfg) for mode in MODES for cfg in (("published", "t") if "midpoint" in mode else ("published",))]
# name: recipe, enhanced_ratio, steps
OBJECTIVES: dict[str, tuple[str, float, int]] = {
    "unguided": ("partition", 0.0, 300),
    "guided": ("partition", 0.5, 300),
    "all_terms": ("all_terms", 0.0, 150),
}
RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 1000  # never reported
NULL = digits.CLASSES  # the label of the unconditional query
NULL_SHARE = 0.1  # of the base model's rows
SIZES = {
    "base_steps": 3000, "base_lr": 2e-3, "batch": 64, "rank": 16, "ema": 0.99, "width": 64, "layers": 3,
    "generated": 2000,
}  # fmt: skip
QUICK_SIZES = SIZES | {"base_steps": 4, "batch": 8, "layers": 1, "generated": 20}
QUICK_STEPS = 2


def condition(label: torch.Tensor) -> Cond:
    """A label as an SD3 condition: its one-hot vector as the only token, and as the pooled vector."""
    rows = nn.functional.one_hot(label, NULL + 1).float()
    return {"prompt_embeds": rows[:, None], "pooled_prompt_embeds": rows}


def transformer(sizes: dict[str, Any]) -> SD3Transformer2DModel:
    """The network: 16 image tokens and one of the label."""
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=sizes["layers"], attention_head_dim=32,
        num_attention_heads=sizes["width"] // 32, joint_attention_dim=NULL + 1, caption_projection_dim=sizes["width"],
        pooled_projection_dim=NULL + 1, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip


def batches(data: digits.Data, rows: int, generator: torch.Generator) -> Iterator[digits.Data]:
    """Images (B, 1, 8, 8) and labels, without end."""
    while True:
        index = torch.randint(len(data[0]), (rows,), generator=generator)
        yield data[0][index].reshape(rows, 1, 8, 8), data[1][index]


def train_base(data: digits.Data, sizes: dict[str, Any]) -> nn.Module:
    """A transformer with averaged weights after plain flow matching, with some labels left out."""
    torch.manual_seed(0)
    student, generator = load(transformer(sizes)), torch.Generator().manual_seed(0)
    average, feed = EMATeacher(student, 0.998), batches(data, sizes["batch"], generator)

    def loss_of_step() -> tuple[torch.Tensor, dict[str, Any]]:
        average.update()
        x, label = next(feed)
        label = torch.where(torch.rand(len(x), generator=generator) < NULL_SHARE, NULL, label)
        t, z = torch.rand(len(x), generator=generator), torch.randn(x.shape, generator=generator)
        velocity = student(torch.lerp(x, z, t[:, None, None, None]), t, t, condition(label))
        return (velocity - (z - x)).square().mean(), {}

    digits.fit(student, sizes["base_steps"], sizes["base_lr"], loss_of_step, lambda k, terms: None)
    return copy.deepcopy(average.module.transformer)


def train_lora(base: nn.Module, data: digits.Data, cell: Cell, sizes: dict[str, Any]) -> EMATeacher:
    """A LoRA of one mode on a copy of the base; the teacher is the averaged student."""
    torch.manual_seed(cell["seed"])
    student = load(copy.deepcopy(base), cfg_time=cell["cfg_time"])
    add_lora(student, sizes["rank"], conditioning=cell["mode"])
    teacher = EMATeacher(student, sizes["ema"])
    criterion = TwinFlowLoss(TwinFlowConfig(recipe=cell["recipe"], enhanced_ratio=cell["enhanced_ratio"]))
    generator = torch.Generator().manual_seed(cell["seed"])
    feed, uncond = batches(data, sizes["batch"], generator), condition(torch.tensor([NULL]))

    def loss_of_step() -> tuple[torch.Tensor, dict[str, Any]]:
        x, label = next(feed)
        out = criterion(student, x, condition(label), uncond, teacher=teacher, generator=generator)
        return out.loss, out.terms

    digits.fit(student, cell["steps"], cell["lr"], loss_of_step, lambda k, terms: None)
    teacher.update()
    return teacher


def scores(student: Student, data: digits.Data, steps: int, style: str, generated: int) -> dict[str, float]:
    """Distance and label accuracy; the same noise for every model."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(generated) % digits.CLASSES
    z = torch.randn(generated, 1, 8, 8, generator=generator)
    gap_end = 0.0 if style == "mul" else None
    x = sample(student, z, condition(label), steps=steps, style=style, gap_end=gap_end, generator=generator)
    found = digits_metrics.evaluate(x.flatten(1), label, *data)
    return {"frechet": found["frechet"], "accuracy": found["accuracy"]}


def references(base: nn.Module, data: digits.Data, sizes: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What the base gives, and where guided targets lead: the base guided as they are."""
    plain, ratio = load(base), OBJECTIVES["guided"][1]

    def guided(x_t: torch.Tensor, t: torch.Tensor, r: torch.Tensor, cond: Cond) -> torch.Tensor:
        labelled, free = plain(x_t, t, r, cond), plain(x_t, t, r, condition(torch.full((len(x_t),), NULL)))
        return labelled + ratio * (labelled - free)

    queries: list[tuple[str, Student, int]] = [(f"base, {n}", plain, n) for n in (1, 2, 4, 50)]
    queries.append(("base guided, 50", guided, 50))
    return {name: scores(model, data, n, "mul", sizes["generated"]) for name, model, n in queries}


def run(base: nn.Module, data: digits.Data, sizes: dict[str, Any], cell: Cell) -> Cell:
    """A cell's training and its scores."""
    started = time.process_time()
    model = train_lora(base, data, cell, sizes)
    measured = by_query(lambda n, style: scores(model, data, n, style, sizes["generated"]))
    return cell | measured | {"cpu_seconds": time.process_time() - started}


def score(cell: Cell) -> float:
    """Geometric mean of the distances of all queries; inf where one diverged."""
    values = list(cell["frechet"].values())
    return math.exp(statistics.mean(math.log(v) for v in values)) if all(map(math.isfinite, values)) else math.inf


def found(cells: list[Cell], **wanted: Any) -> list[Cell]:
    """The cells with these settings."""
    return [cell for cell in cells if wanted.items() <= cell.items()]


def waves(objective: str, quick: bool, seeds: int, cells: list[Cell]) -> Iterator[list[Cell]]:
    """What an objective runs: every learning rate on the tuning seed; then, those being among the cells, the seeds."""
    recipe, ratio, steps = OBJECTIVES[objective]
    steps = QUICK_STEPS if quick else steps
    common = {"objective": objective, "recipe": recipe, "enhanced_ratio": ratio, "steps": steps}
    variants = [{"mode": mode, "cfg_time": cfg} for mode, cfg in VARIANTS if ratio or cfg == "published"]
    yield [common | v | {"seed": TUNING_SEED, "lr": lr} for v in variants for lr in (RATES[:1] if quick else RATES)]
    best = [min(found(cells, objective=objective, seed=TUNING_SEED, **v), key=score)["lr"] for v in variants]
    yield [common | v | {"seed": k, "lr": lr} for k in range(seeds) for v, lr in zip(variants, best, strict=True)]


def table(cells: list[Cell], settings: dict[str, Any]) -> str:
    """Per objective a table: of each mode the mean over the reported seeds and, in brackets, half the range."""
    sizes, heads = settings["sizes"], [f"{style}, {n}" for style, n in QUERIES]
    parts = [
        f"SD3 transformer of {sizes['layers']} layers and width {sizes['width']}, LoRA of rank {sizes['rank']} on one "
        f"flow-matching base ({sizes['base_steps']} steps), batch {sizes['batch']}, AdamW; Fréchet distance of "
        f"{sizes['generated']} images from the averaged LoRA by style and steps: mean over the seeds (half the range). "
        f"lr: the best of {', '.join(f'{r:g}' for r in settings['rates'])} on a seed that is not reported. All: "
        "geometric mean of the five. Accuracy: the lowest of the five means.",
        markdown(
            ["reference, style mul", "Fréchet distance", "label accuracy"],
            [[f"{k} step{'s' * (k != 'base, 1')}", f"{v['frechet']:.2f}", f"{v['accuracy']:.3f}"]
             for k, v in settings["references"].items()],
        ),
    ]  # fmt: skip
    reported = [cell for cell in cells if cell["seed"] != TUNING_SEED]
    for objective in dict.fromkeys(cell["objective"] for cell in reported):
        mine = found(reported, objective=objective)
        runs = [found(mine, mode=mode, cfg_time=cfg) for mode, cfg in VARIANTS]
        first, seeds = mine[0], len({cell["seed"] for cell in mine})
        parts.append(
            f"`{first['recipe']}`, enhanced ratio {first['enhanced_ratio']:g}, {first['steps']} steps, {seeds} seeds:"
        )
        parts.append(
            markdown(["mode", "cfg_time", "lr", *heads, "all", "accuracy"], [_row(run) for run in runs if run])
        )
    return "\n\n".join(parts)


def _row(cells: list[Cell]) -> list[str]:
    names = list(cells[0]["frechet"])
    lowest = min(statistics.mean(cell["accuracy"][name] for cell in cells) for name in names)
    distances = [mean_and_spread([cell["frechet"][name] for cell in cells], 2) for name in names]
    cfg = cells[0]["cfg_time"] if cells[0]["enhanced_ratio"] and "midpoint" in cells[0]["mode"] else ""
    overall = mean_and_spread([score(cell) for cell in cells], 2)
    return [cells[0]["mode"], cfg, f"{cells[0]['lr']:g}", *distances, overall, f"{lowest:.3f}"]


def kept(settings: dict[str, Any]) -> list[Cell]:
    """Cells of an earlier run with the same settings and the same base."""
    path = ROOT / "benchmarks" / "results" / "conditioning_cpu.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    return saved["cells"] if saved.get("settings") == settings else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs; writes nothing")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["unguided", "guided"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, sizes = digits.load_data(), QUICK_SIZES if args.quick else SIZES
    base = train_base(data, sizes)
    settings = {"sizes": sizes, "rates": list(RATES), "references": references(base, data, sizes)}
    cells = [] if args.quick else kept(settings)
    spawn = multiprocessing.get_context("spawn")
    parallel = args.workers > 1
    with ProcessPoolExecutor(args.workers, spawn, torch.set_num_threads, (1,)) if parallel else nullcontext() as pool:
        apply: Callable[..., Iterable[Cell]] = map if pool is None else pool.map
        for objective in args.objectives:
            for wave in waves(objective, args.quick, 1 if args.quick else args.seeds, cells):
                missing = [cell for cell in wave if not found(cells, **cell)]
                for cell in apply(functools.partial(run, base, data, sizes), missing):
                    cells.append(cell)
                    where = [cell[name] for name in ("mode", "cfg_time", "seed", "lr")]
                    print(objective, *where, f"{score(cell):.3f}", cell["frechet"], flush=True)
                    if not args.quick:
                        save("conditioning", settings, cells, table(cells, settings))
    print(table(cells, settings))


if __name__ == "__main__":
    main()
