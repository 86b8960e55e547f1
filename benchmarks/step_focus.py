"""What `step_focus` buys: distances at 1, 2 and 4 steps of models trained for one number of steps, on digits.

`python benchmarks/step_focus.py [--quick] [--steps N] [--seeds N] [--shares ...]`
"""

import argparse

import torch
from digits_runs import QUERIES, by_query, digits, make_base, mean_and_spread, run, save, scores
from report import table as markdown

from twinflow import TwinFlowConfig

COUNTS, SHARES = (1, 2, 4), (0.25, 0.5, 1.0)


def table(cells: list[dict], recipe: str) -> str:
    """Per setting a line: the mean over seeds and, in brackets, half the range."""
    rows = []
    for count, share in dict.fromkeys((c["target_step_count"], c["step_focus"]) for c in cells):
        found = [c for c in cells if (c["target_step_count"], c["step_focus"]) == (count, share)]
        values = [[c["frechet"][f"{style} {n}"] for c in found] for style, n in QUERIES]
        rows.append([f"{share:g}", str(count) if share else "", *(mean_and_spread(v, 3) for v in values)])
    heads = [f"{style}, {n} step{'s' * (n > 1)}" for style, n in QUERIES]
    seeds = len({c["seed"] for c in cells})
    settings = f"`{recipe}`, residual network, {cells[0]['steps']} steps from a short base"
    caption = f"{settings}; Fréchet distance: mean of {seeds} seeds (half the range)."
    return f"{caption}\n\n{markdown(['step_focus', 'target_step_count', *heads], rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs; writes nothing")
    parser.add_argument("--recipe", default="all_terms")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="beside 0")
    parser.add_argument("--steps", type=int, default=600, help="TwinFlow steps per run")
    parser.add_argument("--base-steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps, base_steps = (20, 40) if args.quick else (args.steps, args.base_steps)
    data, cells = digits.load_data(), []
    grid = [(1, 0.0)] + [(count, share) for count in COUNTS for share in args.shares]
    for seed in range(1 if args.quick else args.seeds):
        base = make_base("residual 256", data, base_steps, seed)
        for count, share in grid[-1:] if args.quick else grid:
            config = TwinFlowConfig(recipe=args.recipe, enhanced_ratio=0.0, target_step_count=count, step_focus=share)
            model, cell = run(base, config, data, steps, args.lr, seed)
            cell |= by_query(lambda n, style, model=model: scores(model, data, n, style))
            cells.append({"target_step_count": count, "step_focus": share, **cell})
            print(seed, count, share, {query: round(value, 3) for query, value in cell["frechet"].items()}, flush=True)
            if not args.quick:
                settings = {"recipe": args.recipe, "steps": steps, "base_steps": base_steps, "lr": args.lr}
                save("step_focus", settings, cells, table(cells, args.recipe))
    print(table(cells, args.recipe))


if __name__ == "__main__":
    main()
