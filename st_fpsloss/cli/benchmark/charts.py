"""Small charts as SVG texts, to stand inside an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

ACCENT, GREY = "#c2410c", "#64748b"
_COLOURS = ("#2a6f97", "#7c3aed", "#0f766e", "#a16207", "#64748b", "#be185d", "#4d7c0f")
_WIDTH, _LEFT, _RIGHT, _ROW = 720, 250, 70, 26


def interval_chart(rows: Sequence[tuple[str, float, float, float]], accent: str, form: str = "{:.3f}") -> str:
    """A dot with its interval for each name.

    Args:
        rows: (name, mean, low, high).
        accent: The name that stands out.
        form: How a mean is written.

    Returns:
        The SVG.
    """
    low, high = min(0.0, *(row[2] for row in rows)), max(0.0, *(row[3] for row in rows))
    high = high if high > low else low + 1.0
    height = _ROW * len(rows) + 30

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    parts = [_grid(x(tick), 6, height - 24, _tick(tick)) for tick in _ticks(low, high)]
    parts.append(_line(x(0), 6, x(0), height - 24, "#94a3b8", 1.2))
    for number, (name, mean, start, stop) in enumerate(rows):
        y, colour = _ROW * number + 18, ACCENT if name == accent else _COLOURS[0]
        parts.append(_text(_LEFT - 10, y + 4, name, "end", colour if name == accent else "#0f172a"))
        parts.append(_line(x(start), y, x(stop), y, colour, 3, 0.45))
        parts.append(f'<circle cx="{x(mean):.1f}" cy="{y}" r="5" fill="{colour}"/>')
        parts.append(_text(x(stop) + 8, y + 4, form.format(mean), "start", "#334155"))
    return _svg(height, parts)


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], accent: str, x_label: str, y_label: str, ticks_at_points: bool
) -> str:
    """A line through points for each name, and a legend beside them.

    Args:
        lines: Name -> (x, y), x ascending.
        accent: The name that stands out.
        x_label: What x is.
        y_label: What y is.
        ticks_at_points: Mark the x of the points, rather than round numbers.

    Returns:
        The SVG.
    """
    points = [point for line in lines.values() for point in line]
    xs = [point[0] for point in points]
    left, right, top, bottom, height = 60, 230, 24, 44, 300
    low, high = (min(xs), max(xs)) if ticks_at_points else (0.0, max(xs))
    high, highest = (high if high > low else low + 1.0), max([point[1] for point in points]) or 1.0

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (_WIDTH - left - right)

    def y(value: float) -> float:
        return height - bottom - value / highest * (height - top - bottom)

    parts = [
        _grid(x(one), top, height - bottom, _tick(one))
        for one in (sorted(set(xs)) if ticks_at_points else _ticks(low, high))
    ]
    for one in _ticks(0.0, highest):
        parts.append(_line(left, y(one), _WIDTH - right, y(one), "#e2e8f0", 1))
        parts.append(_text(left - 6, y(one) + 4, _tick(one), "end", GREY))
    parts.append(_text((left + _WIDTH - right) / 2, height - 6, x_label, "middle", GREY))
    parts.append(_text(left - 6, 13, y_label, "start", GREY))
    others = [name for name in lines if name != accent]
    for number, name in enumerate([*others, *[name for name in lines if name == accent]]):  # the accent on top
        colour = ACCENT if name == accent else _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in lines[name])
        width = 3 if name == accent else 1.8
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="{width}" fill="{colour}"/>' for a, b in lines[name]]
        row = top + 18 * number + 6
        parts.append(_line(_WIDTH - right + 16, row, _WIDTH - right + 36, row, colour, width))
        parts.append(_text(_WIDTH - right + 42, row + 4, name, "start", "#0f172a"))
    return _svg(height, parts)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    raw = (high - low) / 5
    size = 10 ** np.floor(np.log10(raw))
    step = float(size * next(factor for factor in (1, 2, 5, 10) if factor * size >= raw))
    return [number * step for number in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _tick(value: float) -> str:
    return f"{value:.10g}"


def _grid(x: float, top: float, bottom: float, label: str) -> str:
    return _line(x, top, x, bottom, "#e2e8f0", 1) + _text(x, bottom + 15, label, "middle", GREY)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, opacity: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}" '
        f'stroke-opacity="{opacity}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" font-size="12" '
        f'font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )
