"""Charts as SVG text that stands in an HTML page: axes, lines, points, boxes. Colours are the page's, by CSS class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape, quoteattr

Point = tuple[float, float]


def element(tag: str, *children: str, **attributes: object) -> str:
    """One element; `children` are markup. `class_` is class, `text_anchor` text-anchor; fractions keep two digits."""
    names = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    written = "".join(f" {name}={quoteattr(_plain(value))}" for name, value in names if value is not None)
    return f"<{tag}{written}>{''.join(children)}</{tag}>"


def text(x: float, y: float, words: object, **attributes: object) -> str:
    return element("text", escape(str(words)), x=x, y=y, **attributes)


def figure(width: float, height: float, *children: str, label: str) -> str:
    """An SVG picture that shrinks with the page; `label` is what it shows, in words."""
    box = f"0 0 {_plain(width)} {_plain(height)}"
    style = f"max-width:{_plain(width)}px"
    return element("svg", *children, viewBox=box, style=style, role="img", aria_label=label)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most about `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    if not low < high:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class Chart:
    """A chart with axes. Everything given is in the units of the data; `draw` returns the picture.

    The ranges hold all of `xs` and `ys`, with some air around.
    """

    LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46

    def __init__(
        self, xs: Iterable[float], ys: Iterable[float], x_label: str, y_label: str, width: int = 560, height: int = 360
    ):
        self.width, self.height = width, height
        self.x_label, self.y_label = x_label, y_label
        self.x_range, self.y_range = _padded(xs), _padded(ys)
        self.marks: list[str] = []

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.LEFT + (value - low) / (high - low) * (self.width - self.LEFT - self.RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.BOTTOM - (value - low) / (high - low) * (self.height - self.TOP - self.BOTTOM)

    def line(self, points: Sequence[Point], class_: str) -> None:
        self.marks.append(element("polyline", points=self._path(points), class_=f"line {class_}"))

    def steps(self, points: Sequence[Point], class_: str) -> None:
        """A line that keeps its height until the next point, and from the last one to the right edge."""
        corners = []
        for (x, y), (until, _) in zip(points, [*points[1:], (self.x_range[1], 0.0)], strict=True):
            corners += [(x, y), (until, y)]
        self.line(corners, class_)

    def band(self, lower: Sequence[Point], upper: Sequence[Point], class_: str) -> None:
        self.marks.append(element("polygon", points=self._path([*lower, *reversed(upper)]), class_=class_))

    def points(self, points: Iterable[Point], class_: str, radius: float = 3) -> None:
        dots = (element("circle", cx=self.x(x), cy=self.y(y), r=radius) for x, y in points)
        self.marks.append(element("g", *dots, class_=class_))

    def dot(self, point: Point, class_: str, title: str, words: str = "", radius: float = 4.5) -> None:
        """A point that says `title` under the mouse, with `words` beside it."""
        x, y = self.x(point[0]), self.y(point[1])
        marks = [element("title", escape(title)), element("circle", cx=x, cy=y, r=radius)]
        if words:
            marks.append(text(x - 7, y - 7, words, class_="small", text_anchor="end"))
        self.marks.append(element("g", *marks, class_=class_))

    def draw(self, label: str) -> str:
        return figure(self.width, self.height, *self._axes(), *self.marks, label=label)

    def _axes(self) -> Iterable[str]:
        left, right = self.LEFT, self.width - self.RIGHT
        top, bottom = self.TOP, self.height - self.BOTTOM
        for value in ticks(*self.x_range):
            x = self.x(value)
            yield element("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid")
            yield text(x, bottom + 17, f"{value:g}", text_anchor="middle", class_="tick")
        for value in ticks(*self.y_range):
            y = self.y(value)
            yield element("line", x1=left, x2=right, y1=y, y2=y, class_="grid")
            yield text(left - 7, y + 4, f"{value:g}", text_anchor="end", class_="tick")
        yield text((left + right) / 2, self.height - 8, self.x_label, text_anchor="middle")
        middle = (top + bottom) / 2
        yield text(14, middle, self.y_label, text_anchor="middle", transform=f"rotate(-90 14 {_plain(middle)})")

    def _path(self, points: Iterable[Point]) -> str:
        return " ".join(f"{_plain(self.x(x))},{_plain(self.y(y))}" for x, y in points)


def _padded(values: Iterable[float]) -> tuple[float, float]:
    """The range of `values` with 5% of air on either side; some range where they are one or none."""
    values = list(values)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    air = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return low - air, high + air


def _plain(value: object) -> str:
    return f"{round(value, 2):.10g}" if isinstance(value, float) else str(value)
