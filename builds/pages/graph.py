"""The page of the graph of packages: drawn, where that can be read, and in any case as lists.

What it was when a run ended is kept beside the page, so that the page can be made again without reading
any source. The states are those of the last runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from builds.packages.drawing import GraphPicture, drawing_of, svg_of
from builds.packages.runs import RunEntry, RunRecord
from builds.pages.index import state_in_words
from builds.pages.places import PagePlaces, link, link_if_there, replace_page
from builds.record import now
from host.documents import json_object, made, read_file
from host.html import page_template
from host.printable import as_json
from inventory.errors import some

_DRAWN, _LINES = 150, 1000
"""Builds and lines of what is drawn: of more nobody sees anything."""
_ROOM = 1080
"""Pixels that a page has for a drawing at most."""
_SMALLEST = 0.75
"""Of its size, that a drawing can still be read in."""
_AROUND = 80
"""Pixels of a page that aren't the drawing's."""
_PROBLEMS = 50


@dataclass(frozen=True, slots=True)
class _ShownNode:
    name: str
    state: str
    because: str
    link: str
    needs: str


def keep_picture(places: PagePlaces, picture: GraphPicture) -> None:
    """For this page. NoSpace, WrongState."""
    replace_page(places.picture, as_json(asdict(picture), indent=0))


def known_picture(places: PagePlaces) -> GraphPicture | None:
    """None: none was kept, or it can't be read any more, which the next run sets right."""
    try:
        found = made(GraphPicture, json_object(read_file(places.picture)))
    except (OSError, ValueError):
        return None
    builds = {name for layer in found.layers for name in layer}
    return found if builds.issuperset(n for one in found.needs for n in (one.build, one.needs)) else None


def write(farm: str, places: PagePlaces, picture: GraphPicture, runs: Iterable[RunRecord]) -> None:
    """Replace the page, and the drawing beside it. ``runs``: the newest first. NoSpace, WrongState."""
    states = _states(runs)
    builds = [name for layer in picture.layers for name in layer]
    drawn = 0 < len(builds) <= _DRAWN and len(picture.needs) <= _LINES
    words = {name: state_in_words(states[name]) if name in states else "waiting" for name in builds}
    if drawn:
        svg = svg_of(picture, _title(farm), words, _links(places, states))
        replace_page(places.drawing, svg)
    else:
        places.drawing.unlink(missing_ok=True)
    replace_page(places.graph, _render(farm, places, picture, states, words, drawn=drawn))


def _render(
    farm: str,
    places: PagePlaces,
    picture: GraphPicture,
    states: Mapping[str, RunEntry],
    words: Mapping[str, str],
    *,
    drawn: bool,
) -> str:
    links = _links(places, states)
    drawing = drawing_of(picture, words, links) if drawn else None
    width = drawing.width if drawing else 0
    needs: dict[str, list[str]] = defaultdict(list)
    for need in picture.needs:
        needs[need.build].append(need.needs)
    layers = [
        [
            _ShownNode(
                name, words[name],
                _because(states[name], words) if words[name] == "skipped" else "",
                links.get(name, ""),
                some(needs[name]) if needs[name] else "",
            )
            for name in layer
        ]
        for layer in picture.layers
    ]  # fmt: skip
    return page_template("packages-graph.html.j2").render(
        farm=farm,
        way=[(f"Farm {farm}", link(places.graph, places.index)), ("Graph", "")],
        glance=_glance(words),
        written=now(),
        picture=picture,
        most=_PROBLEMS,
        layers=layers,
        title=_title(farm),
        drawn=drawing if width * _SMALLEST <= _ROOM else None,
        within=True,
        narrow=round(width * _SMALLEST) + _AROUND,
        svg=places.drawing.name if drawn else "",
    )


def _states(runs: Iterable[RunRecord]) -> Mapping[str, RunEntry]:
    """The last word on each build."""
    found: dict[str, RunEntry] = {}
    for run in runs:
        for entry in run.packages:
            found.setdefault(entry.name, entry)
    return found


def _because(entry: RunEntry, words: Mapping[str, str]) -> str:
    """Why it was skipped."""
    return f"{entry.because} {words[entry.because]}" if entry.because in words else entry.because


def _links(places: PagePlaces, states: Mapping[str, RunEntry]) -> Mapping[str, str]:
    """To packages that were built at least once."""
    return {
        name: link_if_there(places.graph, places.package(entry.package))
        for name, entry in states.items()
    }


def _title(farm: str) -> str:
    return f"Packages of farm {farm}"


def _glance(words: Mapping[str, str]) -> str:
    counts = Counter(words.values())
    parts = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return f"{len(words)} package{'s' * (len(words) != 1)}: {parts}." if words else "No packages."
