"""Lines over a few places, as one SVG that needs nothing else."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

_WIDTH, _HEIGHT = 900, 500  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 290, 84, 64
_LINE = 18  # between two names
_OURS, _OTHERS = "#0b6e4f", ("#b4432b", "#2f5d9e", "#8a5a00", "#77478f", "#4d5966", "#9c2c5d")
_STYLE = """\
text { font: 13px "Source Sans 3", "Helvetica Neue", Arial, sans-serif; fill: #333 }
.title { font-size: 18px; font-weight: 600; fill: #111 }
.about { fill: #666 }
.grid { stroke: #e4e4e4 }
.axis { stroke: #999 }
"""


@dataclass(frozen=True, slots=True)
class ChartLine:
    """``values``: one a place; all above 0. ``ours``: it is drawn to be seen first."""

    name: str
    values: tuple[float, ...]
    ours: bool = False


def line_chart(
    title: str, about: str, places: Sequence[str], lines: Sequence[ChartLine], unit: str
) -> str:
    """The SVG. Its upright axis is logarithmic, from values such as 0.2 to such as 50."""
    low, high = _range([value for line in lines for value in line.values])
    svg = ET.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        width=str(_WIDTH), height=str(_HEIGHT), role="img",
    )  # fmt: skip
    ET.SubElement(svg, "title").text = title
    ET.SubElement(svg, "style").text = _STYLE
    ET.SubElement(svg, "rect", width="100%", height="100%", fill="#fff")
    _text(svg, 24, 36, title, "title")
    _text(svg, 24, 58, about, "about")

    def across(number: int) -> float:
        room = _WIDTH - _LEFT - _RIGHT
        return _LEFT + room * (number + 0.5) / len(places)

    def up(value: float) -> float:
        room = _HEIGHT - _TOP - _BOTTOM
        share = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return _HEIGHT - _BOTTOM - room * share

    for value in _ticks(low, high):
        kind = "axis" if value == low else "grid"
        _rule(svg, _LEFT, up(value), _WIDTH - _RIGHT, up(value), kind)
        _text(svg, _LEFT - 10, up(value) + 4, f"{value:g} {unit}", anchor="end")
    for number, place in enumerate(places):
        _rule(svg, across(number), _HEIGHT - _BOTTOM, across(number), _HEIGHT - _BOTTOM + 5, "axis")
        _text(svg, across(number), _HEIGHT - _BOTTOM + 22, place, anchor="middle")
    names = _apart([up(line.values[-1]) for line in lines])
    colours = iter(_OTHERS * (1 + len(lines) // len(_OTHERS)))
    for line, beside in zip(lines, names, strict=True):
        colour = _OURS if line.ours else next(colours)
        points = [(across(number), up(value)) for number, value in enumerate(line.values)]
        ET.SubElement(
            svg, "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), fill="none",
            stroke=colour, attrib={"stroke-width": "3" if line.ours else "1.6"},
        )  # fmt: skip
        for (x, y), value in zip(points, line.values, strict=True):
            dot = ET.SubElement(
                svg, "circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="5" if line.ours else "3.5", fill=colour
            )
            ET.SubElement(dot, "title").text = f"{line.name}: {value:.3g} {unit}"
        x, y = points[-1]
        _rule(svg, x + 9, y, x + 30, beside, "", colour)
        name = _text(svg, x + 35, beside + 4, f"{line.name}, {line.values[-1]:.2g} {unit}")
        name.set("style", f"fill: {colour}" + ("; font-weight: 600" if line.ours else ""))
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The nearest of 1, 2, 5, 10 ... below and above all of them."""
    steps = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]
    low = max(step for step in steps if step <= min(values) * 0.95)
    high = min(step for step in steps if step >= max(values) * 1.05)
    return low, high


def _ticks(low: float, high: float) -> Iterator[float]:
    for power in range(-4, 6):
        for digit in (1, 2, 5):
            value = round(digit * 10.0**power, 6)
            if low * 0.999 <= value <= high * 1.001:
                yield value


def _apart(heights: Sequence[float]) -> list[float]:
    """Each as near to where it was as it goes with none upon another."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    found = list(heights)
    for _ in range(200):
        moved = False
        for above, below in pairwise(order):
            if (lacks := _LINE - (found[below] - found[above])) > 0.01:
                found[above] -= lacks / 2
                found[below] += lacks / 2
                moved = True
        if not moved:
            break
    return found


def _rule(
    svg: ET.Element, x: float, y: float, x2: float, y2: float, kind: str, colour: str = ""
) -> None:
    line = ET.SubElement(svg, "line", x1=f"{x:.1f}", y1=f"{y:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}")
    if kind:
        line.set("class", kind)
    else:
        line.attrib |= {"stroke": colour, "stroke-opacity": "0.5"}


def _text(
    svg: ET.Element, x: float, y: float, words: str, kind: str = "", anchor: str = ""
) -> ET.Element:
    found = ET.SubElement(svg, "text", x=f"{x:.1f}", y=f"{y:.1f}")
    found.text = words
    if kind:
        found.set("class", kind)
    if anchor:
        found.set("text-anchor", anchor)
    return found
