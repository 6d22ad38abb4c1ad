"""The pictures of a model card: the learning curve, and the softmax of a few clicks. They need matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from st_fpsloss.utils.files import write_whole


def can_draw() -> bool:
    """Whether matplotlib is installed (extra ``demo``)."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curve(steps: Sequence[int], losses: Sequence[float], path: Path) -> None:
    """The training loss by step."""
    figure = _figure(4.6, 2.6)
    axes = figure.subplots()
    axes.plot(steps, losses, color="#2a6f97", linewidth=1.5)
    axes.set(xlabel="step", ylabel="training loss")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_softmax(probabilities: np.ndarray, path: Path) -> None:
    """The rows of softmax(α U Wᵀ) of some clicks; the diagonal holds the probability of each row's own document."""
    figure = _figure(3.6, 3.0)
    axes = figure.subplots()
    image = axes.imshow(probabilities, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="document of row", ylabel="query of row")
    figure.colorbar(image, ax=axes, shrink=0.8, label="probability")
    _save(figure, path)


def _figure(width: float, height: float):  # type: ignore[no-untyped-def]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever backend the program uses
    return figure


def _save(figure, path: Path) -> None:  # type: ignore[no-untyped-def]
    from io import BytesIO

    content = BytesIO()
    figure.savefig(content, format="png", dpi=130, facecolor="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
