"""A graph to look at: as text, and as one SVG that needs nothing else. Columns are layers, from what is
built first on the left; a dashed line is a need at run time, a thick one is in a loop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from builds.packages.graph import Graph, PackageNeed
from builds.packages.schedule import PackageState
from host.html import page_template
from host.printable import one_line

_CHARACTER, _HEIGHT = 7.9, 26  # pixels, of the monospaced 13 px
_ACROSS, _DOWN, _MARGIN = 90, 12, 24
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


def as_text(graph: Graph, states: Mapping[str, PackageState] | None = None) -> str:
    """A line a build, with its state if ``states`` has it, and what it waits for; in brackets what that
    needs at run time. Then the problems."""
    lines = []
    for number, layer in enumerate(graph.layers, 1):
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


def as_svg(graph: Graph, title: str, states: Mapping[str, PackageState] | None = None) -> str:
    """``title``: what it is a graph of. ``states``: of builds, which are waiting else."""
    needs = [need for name in graph.builds for need in graph.needs(name)]
    drawn = _drawn(graph, needs, states or {})
    return page_template("graph.svg.j2").render(title=title, drawn=drawn)


def _drawn(graph: Graph, needs: Sequence[PackageNeed], states: Mapping[str, PackageState]) -> _Drawn:
    columns = _columns(graph, needs)
    tallest = max(map(len, columns), default=0)
    boxes: dict[str, _DrawnBuild] = {}
    heads = []
    x, top = _MARGIN, _MARGIN + 24
    for number, column in enumerate(columns, 1):
        width = round(max(map(len, column)) * _CHARACTER) + 26
        heads.append(_DrawnHead(f"layer {number}: {len(column)}", x, _MARGIN + 8))
        y = top + (tallest - len(column)) * (_HEIGHT + _DOWN) // 2
        for name in column:
            boxes[name] = _DrawnBuild(name, states.get(name, "waiting"), x, y, width, _HEIGHT)
            y += _HEIGHT + _DOWN
        x += width + _ACROSS
    return _Drawn(
        max(x - _ACROSS + _MARGIN, 10 * _MARGIN),
        top + max(tallest, 1) * (_HEIGHT + _DOWN) - _DOWN + _MARGIN,
        tuple(heads),
        tuple(boxes.values()),
        tuple(_lines(graph, needs, boxes)),
    )


def _columns(graph: Graph, needs: Iterable[PackageNeed]) -> list[list[str]]:
    """Each build near the middle of what it has lines to, so that fewer of them cross."""
    columns = [list(layer) for layer in graph.layers]
    beside: dict[str, list[str]] = defaultdict(list)
    for need in needs:
        beside[need.build].append(need.needs)
        beside[need.needs].append(need.build)
    place = {name: (at + 0.5) / len(column) for column in columns for at, name in enumerate(column)}
    for sweep in range(_SWEEPS):
        for column in columns if sweep % 2 == 0 else columns[::-1]:
            middle = {
                name: fmean(place[one] for one in beside[name]) if beside[name] else place[name]
                for name in column
            }
            column.sort(key=lambda name: (middle[name], name))
            place |= {name: (at + 0.5) / len(column) for at, name in enumerate(column)}
    return columns


def _lines(
    graph: Graph, needs: Iterable[PackageNeed], boxes: Mapping[str, _DrawnBuild]
) -> Iterator[_DrawnNeed]:
    for need in needs:
        one, other = boxes[need.needs], boxes[need.build]
        looped = graph.loops_with(need.build, need.needs)
        x, y = one.x + one.width, one.y + _HEIGHT // 2
        x2, y2 = other.x, other.y + _HEIGHT // 2
        bend = max((x2 - x) // 2, _ACROSS // 2)
        path = f"M{x} {y}C{x + bend} {y} {x2 - bend} {y2} {x2} {y2}"
        kind = "loop" if looped else "" if need.direct else "run"
        text = f"{need.build} needs {need.needs}: {'; '.join(map(str, need.steps))}"
        yield _DrawnNeed(kind, path, text)
