"""One-step distance over learning rates, with the published rectify term and with its remedies, on digits.

Each cell trains TwinFlow from a flow-matching base at a constant learning rate, as the published code does, and records
the one-step Fréchet distance of the averaged weights and the drift: the largest root mean square of the student's
one-step samples (real images have 0.85).

    python benchmarks/stability.py [--quick] [--steps N] [--networks ...] [--rates ...]
"""

import argparse

import torch
from digits_runs import NETWORKS, digits, distance, make_base, run, save, scores
from report import table as markdown

from twinflow import TwinFlowConfig

RATES = (1e-4, 5e-4, 1e-3, 2e-3)
# name -> recipe, settings. all_terms has an l2 rectify as published.
VARIANTS = {
    "partition, published": ("partition", {}),
    "partition, rectify_loss=l2": ("partition", {"rectify_loss": "l2"}),
    "partition, rectify_weight=0.25": ("partition", {"rectify_weight": 0.25}),
    "all_terms, published": ("all_terms", {}),
}


def table(cells: list[dict]) -> str:
    """Per network and variant a line, per rate the distance and the drift."""
    rows, rates = [], sorted({c["lr"] for c in cells})
    for network, variant in dict.fromkeys((c["network"], c["variant"]) for c in cells):
        found = {c["lr"]: c for c in cells if (c["network"], c["variant"]) == (network, variant)}
        shown = [found.get(lr) for lr in rates]
        seconds = sum(c["cpu_seconds"] for c in found.values()) / sum(c["steps"] for c in found.values())
        cost = f"{1e3 * seconds:.0f}"
        values = [f"{distance(c['frechet'])} ({distance(c['max_rms'])})" if c else "" for c in shown]
        rows.append([network, variant, *values, cost])
    heads = [f"lr {lr:g}" for lr in rates]
    settings = f"{cells[0]['steps']} steps at a constant learning rate from a short flow-matching base"
    caption = f"One-step Fréchet distance after {settings}; in brackets the largest rms of one-step samples on the way."
    return f"{caption}\n\n{markdown(['network', 'recipe', *heads, 'CPU ms per step'], rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs; writes nothing")
    parser.add_argument("--steps", type=int, default=500, help="TwinFlow steps per cell")
    parser.add_argument("--base-steps", type=int, default=2000)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps, base_steps = (20, 40) if args.quick else (args.steps, args.base_steps)
    data, cells = digits.load_data(), []
    settings = {"steps": steps, "base_steps": base_steps, "seed": args.seed, "batch": digits.BATCH, "data_rms": 0.85}
    for network in args.networks:
        base = make_base(network, data, base_steps, args.seed)
        for variant, (recipe, changes) in VARIANTS.items():
            for lr in args.rates[-1:] if args.quick else args.rates:
                config = TwinFlowConfig(recipe=recipe, enhanced_ratio=0.0, **changes)
                model, cell = run(base, config, data, steps, lr, args.seed, scheduled=False)
                cells.append({"network": network, "variant": variant, **cell, **scores(model, data, 1, "few")})
                print(
                    f"{network}, {variant}, lr {lr:g}: {distance(cells[-1]['frechet'])}, rms {cell['max_rms']:.3g}",
                    flush=True,
                )
                if not args.quick:
                    save("stability", settings, cells, table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
