"""Draws the pictures of README: the two towers with their matrix, and time and memory beside other losses.

Run:
    python docs/images/make_images.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).parent
QUERY, DOCUMENT, INK, PALE = "#2a6f97", "#c8553d", "#2b2b2b", "#e9ecef"

# python -m tests.benchmarks.training_step --batch_size 1024: seconds over FPSLoss's, and GiB.
STEP = {
    "FPSLoss": (1.0, 4.4),
    "FPSLoss,\ncache_gradients=True": (1.24, 0.65),
    "CachedMultipleNegatives-\nRankingLoss": (6.11, 1.83),
}


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    """A rounded box with a centred text."""
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", color=colour, lw=0)
    )
    axes.text(x + width / 2, y + height / 2, text, color="white", ha="center", va="center", fontsize=11)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """An arrow between two points."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, lw=1.4))


def towers(path: Path) -> None:
    """Two encoders with their MLPs, and the full product softmax over the batch."""
    figure, axes = plt.subplots(figsize=(9.6, 3.9))
    axes.set(xlim=(0, 12.4), ylim=(0, 5))
    axes.axis("off")
    rows = [
        ("red shoes", "Sneaker, red, canvas"),
        ("running", "Runner 3, cushioned"),
        ("rain coat", "Parka, waterproof"),
    ]
    for y, side, colour, texts in (
        (3.35, "query", QUERY, [query for query, _ in rows]),
        (0.75, "document", DOCUMENT, [document for _, document in rows]),
    ):
        for number, text in enumerate(texts):
            axes.text(2.0, y + 0.75 - 0.35 * number, text, ha="right", va="center", fontsize=10, color=INK)
        arrow(axes, (2.1, y + 0.4), (2.5, y + 0.4), colour)
        box(axes, 2.55, y, 1.5, 0.8, "BERT", colour)
        arrow(axes, (4.1, y + 0.4), (4.5, y + 0.4), colour)
        box(axes, 4.55, y, 1.2, 0.8, "MLP", colour)
        axes.text(4.15, y + 1.0, f"{side} tower", ha="center", fontsize=11, color=colour, weight="bold")
    axes.text(6.15, 3.75, "U", fontsize=14, color=QUERY, va="center", style="italic")
    axes.text(6.15, 1.15, "W", fontsize=14, color=DOCUMENT, va="center", style="italic")
    arrow(axes, (6.5, 3.75), (7.05, 3.2), QUERY)
    arrow(axes, (6.5, 1.15), (7.05, 1.7), DOCUMENT)

    shares = np.array([[0.86, 0.11, 0.03], [0.12, 0.83, 0.05], [0.02, 0.06, 0.92]])
    left, bottom, size = 7.5, 1.2, 0.85
    for row in range(3):
        for column in range(3):
            positive = row == column
            strength = shares[row, column]
            colour = plt.cm.Greens(0.25 + 0.6 * strength) if positive else plt.cm.Greys(0.08 + 1.6 * strength)
            x, y = left + column * size, bottom + (2 - row) * size
            axes.add_patch(plt.Rectangle((x, y), size * 0.94, size * 0.94, color=colour, lw=0))
            axes.text(
                x + size * 0.47, y + size * 0.47, f"{strength:.2f}", ha="center", va="center", fontsize=9, color=INK
            )
        axes.text(left - 0.1, bottom + (2 - row) * size + 0.4, f"$q_{row + 1}$", ha="right", va="center", color=QUERY)
        axes.text(left + row * size + 0.4, bottom + 3 * size + 0.12, f"$d_{row + 1}$", ha="center", color=DOCUMENT)
    axes.text(left + 1.5 * size, 0.72, r"softmax$(\alpha\, U W^\top + \beta)$", ha="center", fontsize=12, color=INK)
    axes.text(
        10.35,
        2.45,
        "every document of the batch\n"
        "is a negative of every\nother query; α is learned;\nrepeated rows are\nencoded once",
        va="center",
        fontsize=9.5,
        color=INK,
    )
    figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def speed(path: Path) -> None:
    """Time and memory of a training step beside sentence-transformers' losses."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 2.1), sharey=True)
    names = list(STEP)[::-1]
    colours = ["#adb5bd", QUERY, QUERY]
    for axes, values, label in (
        (panels[0], [STEP[name][0] for name in names], "time of a step (FPSLoss = 1)"),
        (panels[1], [STEP[name][1] for name in names], "peak memory, GiB"),
    ):
        bars = axes.barh(names, values, color=colours, height=0.62)
        axes.bar_label(
            bars, [f"{value:.2g}" if value < 1 else f"{value:.1f}" for value in values], padding=3, fontsize=9
        )
        axes.set_title(label, fontsize=10, loc="left")
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
        axes.margins(x=0.12)
        axes.tick_params(axis="y", labelsize=9, length=0)
    figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    towers(FOLDER / "two_towers.png")
    speed(FOLDER / "speed.png")
