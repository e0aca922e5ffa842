"""Charts: small SVG, made here of numbers alone. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from markupsafe import Markup

__all__ = ["share", "sparkline"]

_WIDTH: Final = 240
_HEIGHT: Final = 44
_MARGIN: Final = 3


def sparkline(values: Sequence[float]) -> Markup:
    """A line over time with an area beneath, from zero to the highest value; the text beside it says the numbers."""
    points = _points(values if len(values) > 1 else [*values, *values] or [0.0, 0.0])
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    base = _HEIGHT - _MARGIN
    last = points[-1]
    return Markup(  # noqa: S704  numbers only
        f'<svg class="spark" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f'<polygon class="area" points="{points[0][0]:.1f},{base} {line} {last[0]:.1f},{base}"/>'
        f'<polyline class="line" points="{line}"/></svg>'
    )


def _points(values: Sequence[float]) -> list[tuple[float, float]]:
    peak = max(*values, 0.0) or 1.0
    room, step = _HEIGHT - 2 * _MARGIN, _WIDTH / (len(values) - 1)
    return [(at * step, _HEIGHT - _MARGIN - room * max(0.0, value) / peak) for at, value in enumerate(values)]


def share(parts: Sequence[tuple[str, int]]) -> Markup:
    """A bar whose parts are as wide as their numbers; the name of a part is its class."""
    total = sum(number for _, number in parts) or 1
    drawn, at = [], 0.0
    for name, number in parts:
        width = 100 * number / total
        drawn.append(f'<rect class="{name}" x="{at:.2f}" width="{width:.2f}" height="8"/>')
        at += width
    return Markup(  # noqa: S704  our own names, and numbers
        f'<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{"".join(drawn)}</svg>'
    )
