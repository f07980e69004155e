"""A graph to look at: as text, and as one SVG that needs nothing else. Columns are layers, from what is
built first on the left; a dashed line is a need at run time, a thick one is in a loop. Lines from one
build go together as long as they can, and none goes behind a box.

A picture is what is drawn of a graph: it can be kept, and drawn again when the states are others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal

from builds.packages.graph import Graph
from host.html import page_template
from host.printable import one_line

_CHARACTER, _HEIGHT = 7.9, 26  # pixels, of the monospaced 13 px
_ACROSS, _DOWN, _PASSING, _MARGIN = 90, 12, 12, 24
_SWEEPS = 4


NeedKind = Literal["", "run", "loop"]
"""Of a line: for a build, at run time alone, within a loop."""


@dataclass(frozen=True, slots=True)
class PicturedNeed:
    """``build`` comes after ``needs``, as ``text`` says."""

    build: str
    needs: str
    kind: NeedKind
    text: str


@dataclass(frozen=True, slots=True)
class GraphPicture:
    """``layers``: names of builds, as of a graph. ``problems``: a line each."""

    layers: tuple[tuple[str, ...], ...]
    needs: tuple[PicturedNeed, ...]
    problems: tuple[str, ...] = ()


def picture_of(graph: Graph, only: Collection[str] | None = None) -> GraphPicture:
    """``only``: builds by name; others are left out."""
    layers = _layers(graph, only)
    drawn = {name for layer in layers for name in layer}
    return GraphPicture(
        layers,
        tuple(
            PicturedNeed(
                name, need.needs,
                "loop" if graph.loops_with(name, need.needs) else "" if need.direct else "run",
                f"{name} needs {need.needs}: {'; '.join(map(str, need.steps))}",
            )
            for layer in layers
            for name in layer
            for need in graph.needs(name)
            if need.needs in drawn
        ),
        tuple(one_line(str(problem)) for problem in graph.problems),
    )  # fmt: skip


def _layers(graph: Graph, only: Collection[str] | None) -> tuple[tuple[str, ...], ...]:
    """Those that have builds to be shown."""
    if only is None:
        return graph.layers
    found = (tuple(name for name in layer if name in only) for layer in graph.layers)
    return tuple(filter(None, found))


@dataclass(frozen=True, slots=True)
class _DrawnBuild:
    name: str
    state: str
    link: str
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class _DrawnNeed:
    kind: str
    path: str
    text: str


@dataclass(frozen=True, slots=True)
class _DrawnHead:
    text: str
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class GraphDrawing:
    """Where everything is, in pixels."""

    width: int
    height: int
    heads: tuple[_DrawnHead, ...]
    boxes: tuple[_DrawnBuild, ...]
    lines: tuple[_DrawnNeed, ...]


def as_text(
    graph: Graph,
    states: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> str:
    """A line a build, with its state if ``states`` has it, and what it waits for; in brackets what that
    needs at run time. Then the problems. ``only``: builds by name; others are left out."""
    lines = []
    for number, layer in enumerate(_layers(graph, only), 1):
        lines.append(f"layer {number}")
        width = max(map(len, layer))
        for name in layer:
            state = f"  {(states or {}).get(name, ''):<7}" if states else ""
            needs = graph.needs(name)
            direct = [need.needs for need in needs if need.direct]
            run = [need.needs for need in needs if not need.direct]
            parts = [", ".join(direct), f"({', '.join(run)})" if run else ""]
            after = " ".join(filter(None, parts))
            lines.append(f"  {name:<{width}}{state}{'  <- ' + after if after else ''}".rstrip())
    lines += (one_line(str(problem)) for problem in graph.problems)
    return "\n".join([*lines, ""])


def as_svg(
    graph: Graph,
    title: str,
    states: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> str:
    """``title``: what it is a graph of. ``states``: of builds, which are waiting else. ``only``: as of
    ``picture_of``."""
    return svg_of(picture_of(graph, only), title, states or {})


def svg_of(
    picture: GraphPicture,
    title: str,
    states: Mapping[str, str],
    links: Mapping[str, str] | None = None,
) -> str:
    """As ``as_svg``. ``links``: where builds lead to."""
    drawn = drawing_of(picture, states, links or {})
    return page_template("graph.svg.j2").render(title=title, drawn=drawn, within=False)


_Slot = tuple[str, int]
"""A build in its column, or in a later one the line from it that passes there."""


def drawing_of(
    picture: GraphPicture, states: Mapping[str, str], links: Mapping[str, str]
) -> GraphDrawing:
    """``states`` and ``links``: as of ``svg_of``."""
    layer = {name: at for at, names in enumerate(picture.layers) for name in names}
    columns = _columns(picture, layer)
    heights = [
        sum(_HEIGHT + _DOWN if layer[name] == at else _PASSING for name, at in column)
        for column in columns
    ]
    tallest = max(heights, default=0)
    boxes: dict[str, _DrawnBuild] = {}
    heads: list[_DrawnHead] = []
    passing: dict[_Slot, tuple[int, int, int]] = {}
    x, top = _MARGIN, _MARGIN + 24
    for number, (column, height) in enumerate(zip(columns, heights, strict=True)):
        names = [name for name, _ in column if layer[name] == number]
        width = round(max(map(len, names)) * _CHARACTER) + 26
        heads.append(_DrawnHead(f"layer {number + 1}: {len(names)}", x, _MARGIN + 8))
        y = top + (tallest - height) // 2
        for name, _ in column:
            if layer[name] == number:
                state = states.get(name, "waiting")
                boxes[name] = _DrawnBuild(name, state, links.get(name, ""), x, y, width, _HEIGHT)
                y += _HEIGHT + _DOWN
            else:
                passing[name, number] = (x, y, x + width)
                y += _PASSING
        x += width + _ACROSS
    return GraphDrawing(
        max(x - _ACROSS + _MARGIN, 10 * _MARGIN),
        top + tallest + _MARGIN,
        tuple(heads),
        tuple(boxes.values()),
        tuple(_lines(picture, layer, boxes, passing)),
    )


def _columns(picture: GraphPicture, layer: Mapping[str, int]) -> list[list[_Slot]]:
    """Each build, and each line that passes, near the middle of what it leads to, so that fewer lines
    cross."""
    columns = [[(name, at) for name in names] for at, names in enumerate(picture.layers)]
    beside: dict[_Slot, dict[_Slot, None]] = defaultdict(dict)
    passing: dict[_Slot, None] = {}
    for need in picture.needs:
        ends = range(layer[need.needs] + 1, layer[need.build])
        way = [(need.needs, at) for at in (layer[need.needs], *ends)]
        for one, other in pairwise((*way, (need.build, layer[need.build]))):
            beside[one][other] = beside[other][one] = None
        passing |= dict.fromkeys(way[1:])
    for place in passing:
        columns[place[1]].append(place)
    where = {place: (at + 0.5) / len(column) for column in columns for at, place in enumerate(column)}
    for sweep in range(_SWEEPS):
        for column in columns if sweep % 2 == 0 else columns[::-1]:
            middle = {
                place: fmean(where[one] for one in beside[place]) if beside[place] else where[place]
                for place in column
            }
            column.sort(key=lambda place: (middle[place], place))
            where |= {place: (at + 0.5) / len(column) for at, place in enumerate(column)}
    return columns


def _lines(
    picture: GraphPicture,
    layer: Mapping[str, int],
    boxes: Mapping[str, _DrawnBuild],
    passing: Mapping[_Slot, tuple[int, int, int]],
) -> Iterator[_DrawnNeed]:
    for need in picture.needs:
        one, other = boxes[need.needs], boxes[need.build]
        x, y = one.x + one.width, one.y + _HEIGHT // 2
        path = f"M{x} {y}"
        for at in range(layer[need.needs] + 1, layer[need.build]):
            left, height, right = passing[need.needs, at]
            path += f"{_bend(x, y, left, height)}H{right}"
            x, y = right, height
        path += _bend(x, y, other.x, other.y + _HEIGHT // 2)
        yield _DrawnNeed(need.kind, path, need.text)


def _bend(x: int, y: int, x2: int, y2: int) -> str:
    reach = max((x2 - x) // 2, _ACROSS // 2)
    return f"C{x + reach} {y} {x2 - reach} {y2} {x2} {y2}"
