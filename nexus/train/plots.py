"""Curves as inline SVG: text in, text out, the same text for the same numbers."""

import math
from html import escape
from typing import NamedTuple

Points = list[tuple[float, float]]
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 28       # margins around the drawing, in the units of its font
COLUMNS = 300       # a curve is drawn with at most two points (lowest, highest) for each of these columns
HOVERS = 100        # places that answer the pointer


class Axis(NamedTuple):
    """From a value to a coordinate: a line, or a line in the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def curve(name: str, points: Points, width: int = 640, height: int = 240) -> str:
    """An SVG of (step, value) points: raw, smoothed, with hover texts; a log axis for positive values of wide range."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return '<p class="quiet">no finite values yet</p>'
    smooth = smoothed(points)
    x, y = _axes(points, width, height)
    line = "" if len(points) == 1 else f'<polyline class="raw" points="{_path(thinned(points), x, y)}"/>'
    head = f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)} by training step">'
    return "".join([head, _grid(x, y), line, f'<polyline class="smooth" points="{_path(thinned(smooth), x, y)}"/>',
                    _hovers(name, points, smooth, x, y), "</svg>"])


def smoothed(points: Points) -> Points:
    """The exponential mean over about an eightieth of the points, from both ends so that it lags behind neither."""
    forward, backward = _trail(points), _trail(points[::-1])[::-1]
    return [(x, (a + b) / 2) for (x, _), a, b in zip(points, forward, backward, strict=True)]


def _trail(points: Points) -> list[float]:
    """The running exponential mean, without the pull of its start (Kingma & Ba 2014, section 3)."""
    keep = 1 - 1 / max(1.0, len(points) / 80)
    total = weight = 0.0
    out = []
    for _, y in points:
        total, weight = keep * total + y, keep * weight + 1
        out.append(total / weight)
    return out


def thinned(points: Points) -> Points:
    """At most two points a column, its lowest and highest, so that no spike is lost."""
    if len(points) <= 2 * COLUMNS:
        return points
    out: Points = []
    for i in range(COLUMNS):
        part = points[i * len(points) // COLUMNS:(i + 1) * len(points) // COLUMNS]
        out += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [points[0], *out, points[-1]]


def _axes(points: Points, width: int, height: int) -> tuple[Axis, Axis]:
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    log = low > 0 and high / low > 8
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    last = max(xs) if max(xs) > min(xs) else min(xs) + 1
    return Axis(min(xs), last, LEFT, width - RIGHT), Axis(low, high, height - BOTTOM, TOP, log)


def ticks(axis: Axis) -> list[float]:
    """Four to eight round values on an axis."""
    if axis.log:
        decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        for marks in ((1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**d for d in decades for m in marks if axis.low <= m * 10.0**d <= axis.high]
            if len(found) <= 7:
                break
        return found[:: -(-len(found) // 7)] if found else [axis.low, axis.high]
    rough = (axis.high - axis.low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    return [i * step for i in range(math.ceil(axis.low / step), math.floor(axis.high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters: 12k, 0.0123, 3e-05."""
    if value and abs(value) >= 10_000 and abs(value) < 1e9:
        return f"{value / 1e3:.4g}k" if abs(value) < 1e6 else f"{value / 1e6:.4g}M"
    return f"{value:.4g}"


def _grid(x: Axis, y: Axis) -> str:
    out = []
    for value in ticks(y):
        at = y(value)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{x.end:.0f}" y1="{at:.1f}" y2="{at:.1f}"/>'
                   f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in ticks(x):
        if value == int(value):
            out.append(f'<text x="{x(value):.1f}" y="{y.start + BOTTOM - 8:.0f}" text-anchor="middle">'
                       f"{short(value)}</text>")
    return "".join(out)


def _path(points: Points, x: Axis, y: Axis) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)


def _hovers(name: str, points: Points, smooth: Points, x: Axis, y: Axis) -> str:
    """Invisible columns; under the pointer one shows its line, its dot and its numbers."""
    count = min(HOVERS, len(points))
    chosen = [i * (len(points) - 1) // max(1, count - 1) for i in range(count)]
    wide = (x.end - x.start) / max(1, count)
    out: list[str] = []
    for i in chosen:
        (step, value), at, high = points[i], x(points[i][0]), y(smooth[i][1])
        left = min(max(at - wide / 2, x.start), x.end - wide)
        text = f"step {step:,.0f}\n{name} {value:.5g}\nsmoothed {smooth[i][1]:.5g}"
        out.append(f'<g class="hover"><title>{escape(text)}</title>'
                   f'<rect x="{left:.1f}" y="{TOP}" width="{wide:.1f}" height="{y.start - TOP:.0f}"/>'
                   f'<path d="M{at:.1f} {TOP}V{y.start:.0f}"/><circle cx="{at:.1f}" cy="{high:.1f}" r="3.5"/></g>')
    return "".join(out)
