"""A graph to look at: as text, and as one SVG that needs nothing else. Columns are layers, from what is
built first on the left; a dashed line is a need at run time, a thick one is in a loop. Lines from one
build go together as long as they can, and none goes behind a box."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from builds.packages.graph import Graph, PackageNeed
from builds.packages.schedule import PackageState
from host.html import page_template
from host.printable import one_line

_CHARACTER, _HEIGHT = 7.9, 26  # pixels, of the monospaced 13 px
_ACROSS, _DOWN, _PASSING, _MARGIN = 90, 12, 12, 24
_SWEEPS = 4


@dataclass(frozen=True, slots=True)
class _DrawnBuild:
    name: str
    state: PackageState
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
class _Drawn:
    width: int
    height: int
    heads: tuple[_DrawnHead, ...]
    boxes: tuple[_DrawnBuild, ...]
    lines: tuple[_DrawnNeed, ...]


def as_text(
    graph: Graph,
    states: Mapping[str, PackageState] | None = None,
    only: Collection[str] | None = None,
) -> str:
    """A line a build, with its state if ``states`` has it, and what it waits for; in brackets what that
    needs at run time. Then the problems. ``only``: builds by name, others are left out."""
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
    states: Mapping[str, PackageState] | None = None,
    only: Collection[str] | None = None,
) -> str:
    """``title``: what it is a graph of. ``states``: of builds, which are waiting else. ``only``: as of
    ``as_text``."""
    layers = _layers(graph, only)
    at = {name: number for number, layer in enumerate(layers) for name in layer}
    needs = [need for name in at for need in graph.needs(name) if need.needs in at]
    drawn = _drawn(graph, layers, at, needs, states or {})
    return page_template("graph.svg.j2").render(title=title, drawn=drawn)


def _layers(graph: Graph, only: Collection[str] | None) -> tuple[tuple[str, ...], ...]:
    """Those that have builds to be shown."""
    if only is None:
        return graph.layers
    found = (tuple(name for name in layer if name in only) for layer in graph.layers)
    return tuple(filter(None, found))


_Place = tuple[str, int]
"""A build in its column, or in a later one the line from it that passes there."""


def _drawn(
    graph: Graph,
    layers: Sequence[Sequence[str]],
    layer: Mapping[str, int],
    needs: Sequence[PackageNeed],
    states: Mapping[str, PackageState],
) -> _Drawn:
    """``layer``: of each build, where in ``layers`` it is."""
    columns = _columns(layers, layer, needs)
    heights = [
        sum(_HEIGHT + _DOWN if layer[name] == at else _PASSING for name, at in column)
        for column in columns
    ]
    tallest = max(heights, default=0)
    boxes: dict[str, _DrawnBuild] = {}
    heads: list[_DrawnHead] = []
    passing: dict[_Place, tuple[int, int, int]] = {}
    x, top = _MARGIN, _MARGIN + 24
    for number, (column, height) in enumerate(zip(columns, heights, strict=True)):
        names = [name for name, _ in column if layer[name] == number]
        width = round(max(map(len, names)) * _CHARACTER) + 26
        heads.append(_DrawnHead(f"layer {number + 1}: {len(names)}", x, _MARGIN + 8))
        y = top + (tallest - height) // 2
        for name, _ in column:
            if layer[name] == number:
                boxes[name] = _DrawnBuild(name, states.get(name, "waiting"), x, y, width, _HEIGHT)
                y += _HEIGHT + _DOWN
            else:
                passing[name, number] = (x, y, x + width)
                y += _PASSING
        x += width + _ACROSS
    return _Drawn(
        max(x - _ACROSS + _MARGIN, 10 * _MARGIN),
        top + tallest + _MARGIN,
        tuple(heads),
        tuple(boxes.values()),
        tuple(_lines(graph, layer, needs, boxes, passing)),
    )


def _columns(
    layers: Sequence[Sequence[str]], layer: Mapping[str, int], needs: Iterable[PackageNeed]
) -> list[list[_Place]]:
    """Each build, and each line that passes, near the middle of what it leads to, so that fewer lines
    cross."""
    columns = [[(name, at) for name in names] for at, names in enumerate(layers)]
    beside: dict[_Place, dict[_Place, None]] = defaultdict(dict)
    passing: dict[_Place, None] = {}
    for need in needs:
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
    graph: Graph,
    layer: Mapping[str, int],
    needs: Iterable[PackageNeed],
    boxes: Mapping[str, _DrawnBuild],
    passing: Mapping[_Place, tuple[int, int, int]],
) -> Iterator[_DrawnNeed]:
    for need in needs:
        one, other = boxes[need.needs], boxes[need.build]
        x, y = one.x + one.width, one.y + _HEIGHT // 2
        path = f"M{x} {y}"
        for at in range(layer[need.needs] + 1, layer[need.build]):
            left, height, right = passing[need.needs, at]
            path += f"{_bend(x, y, left, height)}H{right}"
            x, y = right, height
        path += _bend(x, y, other.x, other.y + _HEIGHT // 2)
        looped = graph.loops_with(need.build, need.needs)
        kind = "loop" if looped else "" if need.direct else "run"
        text = f"{need.build} needs {need.needs}: {'; '.join(map(str, need.steps))}"
        yield _DrawnNeed(kind, path, text)


def _bend(x: int, y: int, x2: int, y2: int) -> str:
    reach = max((x2 - x) // 2, _ACROSS // 2)
    return f"C{x + reach} {y} {x2 - reach} {y2} {x2} {y2}"
