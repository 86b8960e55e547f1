"""What the digits example measures and shows: Fréchet distance, label accuracy, class counts, a table and a picture."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_data import CLASSES
from matplotlib.figure import Figure
from rich.table import Table


def _moments(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    pixels = images.double().numpy()
    return pixels.mean(0), np.cov(pixels.T)


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(generated: torch.Tensor, real: torch.Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of images, in pixel space.

    Args:
        generated, real: (N, D) and (M, D) pixels in [-1, 1].

    Returns:
        |mean difference|^2 + trace(A + B - 2 (A^1/2 B A^1/2)^1/2); inf where a sample is not finite or overflows.
    """
    if not bool(torch.isfinite(generated).all()) or float(generated.abs().max()) > 1e100:
        return float("inf")
    (mean_a, cov_a), (mean_b, cov_b) = _moments(generated), _moments(real)
    root = _root(cov_b)
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_a @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def evaluate(generated: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Scores generated images against all real ones.

    Args:
        generated, wanted: (N, D) pixels and the (N,) labels they were generated for.
        real, labels: (M, D) pixels and their (M,) labels.

    Returns:
        frechet; accuracy: share of images whose nearest real image, in pixel space, has the wanted label;
        class_counts: images per label of the nearest real image; rms of the pixels.
    """
    finite = torch.nan_to_num(generated, nan=0.0, posinf=0.0, neginf=0.0)
    nearest = labels[torch.cdist(finite, real).argmin(1)]
    return {
        "frechet": frechet_distance(generated, real),
        "accuracy": float((nearest == wanted).double().mean()),
        "class_counts": torch.bincount(nearest, minlength=CLASSES).tolist(),
        "rms": float(generated.double().square().mean().sqrt()),
    }


def half_against_half(real: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """The same scores of one half of the real images against the other: what sampling error alone costs."""
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    a, b = order.chunk(2)
    return evaluate(real[a], labels[a], real[b], labels[b])


def results_table(rows: list[dict[str, Any]], title: str) -> Table:
    """One line per model and number of steps."""
    table = Table(title=title)
    table.add_column("model")
    for name in ("steps", "style", "Fréchet distance", "label accuracy", "images per class"):
        table.add_column(name, justify="right")
    for row in rows:
        counts, distance = row["class_counts"], row["frechet"]
        shown = f"{distance:.3f}" if distance < 1e4 else f"{distance:.1e}"
        scores = (shown, f"{row['accuracy']:.3f}", f"{min(counts)}..{max(counts)}")
        table.add_row(row["model"], str(row["steps"] or ""), row["style"], *scores)
    return table


def save_picture(rows: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a PNG: one line of images per method, one column per class.

    Args:
        rows: name -> (CLASSES, 64) pixels, one image per class in order.
        path: the file.
    """
    figure = Figure(figsize=(CLASSES * 0.8 + 2.0, len(rows) * 0.8 + 0.4))
    axes = figure.subplots(len(rows), CLASSES)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for digit, (axis, image) in enumerate(zip(line, images, strict=True)):
            axis.imshow(image.reshape(8, 8), cmap="gray_r", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
            if line is axes[0]:
                axis.set_title(str(digit))
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=120)
