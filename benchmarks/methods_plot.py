"""A scatter plot in plain SVG: a logarithmic axis of counts, shares from 0 to 1, a label at each point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 820, 420
LEFT, RIGHT, TOP, BOTTOM = 60, 130, 34, 46
_STYLE = "text{font:11px sans-serif;fill:#555}.t{font-size:13px}line{stroke:#999;stroke-opacity:.3}circle{fill:#2a78c8}"
_LINE = 11.0
"""Between two labels that would cover each other, in pixels."""


@dataclass(frozen=True, slots=True)
class Point:
    name: str
    count: int
    share: float


def plot(panels: Mapping[str, Sequence[Point]], x: str, y: str) -> str:
    """Panels by title, one below the other."""
    shown = {title: points for title, points in panels.items() if points}
    height = HEIGHT * max(1, len(shown))
    body = [_panel(title, points, index * HEIGHT, x, y) for index, (title, points) in enumerate(shown.items())]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">'
    return "\n".join([head, f"<style>{_STYLE}</style>", *body, "</svg>"]) + "\n"


def _panel(title: str, points: Sequence[Point], top: float, x: str, y: str) -> str:
    low = math.floor(math.log10(min(point.count for point in points)))
    high = math.ceil(math.log10(max(point.count for point in points) + 1))

    def across(count: float) -> float:
        return LEFT + (math.log10(count) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def down(share: float) -> float:
        return top + TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    lines = [_text(LEFT, top + 20, title, "t")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        lines += [
            _line(LEFT, down(share), WIDTH - RIGHT, down(share)),
            _text(LEFT - 38, down(share) + 4, f"{share:.0%}"),
        ]
    for power in range(low, high + 1):
        at = across(10**power)
        lines += [_line(at, down(0), at, down(1)), _text(at - 14, down(0) + 16, f"{10**power:,}")]
    lines += [_text(WIDTH / 2 - 60, down(0) + 34, x), _text(4, top + TOP - 8, y)]
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (-point.share, point.count)):
        left, height = across(point.count), down(point.share)
        beside = _free(taken, left, height, len(point.name))
        taken.append((left + 6, beside))
        lines += [f'<circle cx="{left:.1f}" cy="{height:.1f}" r="3"/>', _text(left + 6, beside + 4, point.name)]
    return "\n".join(lines)


def _free(taken: Sequence[tuple[float, float]], x: float, y: float, letters: int) -> float:
    """The first height from y down where a label covers no other."""
    near = [other for left, other in taken if abs(left - x - 6) < 6.0 * letters + 30]
    while any(abs(other - y) < _LINE for other in near):
        y += _LINE / 2
    return y


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
