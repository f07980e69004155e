"""The page of all builds that cycles made, with what each was built from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from builds.pages.places import PagePlaces, link, link_if_there
from builds.record import BuildRecord, now
from host.html import page_template
from inventory.errors import WrongState


def render(
    farm: str,
    places: PagePlaces,
    cycles: Sequence[BuildRecord],
    unreadable: Mapping[str, WrongState],
) -> str:
    """The page as text. ``cycles``: the newest first; ``unreadable``: those that can't be shown."""
    page = places.builds
    good = next((cycle for cycle in cycles if cycle.result == "passed"), None)
    return page_template("builds.html.j2").render(
        way=[(f"Farm {farm}", link(page, places.index)), ("Builds", "")],
        glance=_glance(cycles),
        good=good,
        written=now(),
        cycles=cycles,
        unreadable=unreadable,
        vms=lambda cycle: ", ".join(dict.fromkeys(step.vm for step in cycle.steps if step.vm)),
        to_cycle=lambda cycle: link_if_there(page, cycle.page),
    )


def _glance(cycles: Sequence[BuildRecord]) -> str:
    if not cycles:
        return "Nothing was built yet."
    ends = ", ".join(f"{n} {end}" for end, n in Counter(cycle.result for cycle in cycles).most_common())
    return f"{len(cycles)} build{'s' * (len(cycles) != 1)}: {ends}."
