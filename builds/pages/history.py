"""The page of a package: its builds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from builds.pages.channels import ChannelContents
from builds.pages.places import PagePlaces, link
from builds.pages.summary import BuildSummary, PackageSummaries
from builds.record import now
from host.html import page_template
from inventory.sizes import format_duration

BUILDS, _BARS = 100, 40
"""Shown of a package: listed, drawn."""


@dataclass(frozen=True, slots=True)
class _Bar:
    result: str
    height: str
    title: str


def render(
    farm: str, package: str, places: PagePlaces, summaries: PackageSummaries, channels: ChannelContents
) -> str:
    """The page as text."""
    page = places.package(package)
    builds = tuple(islice(summaries.of(package), BUILDS))
    drawn = [build for build in builds if build.result in ("passed", "failed")][:_BARS][::-1]
    most = max((build.seconds for build in drawn), default=0.0)
    return page_template("package.html.j2").render(
        package=package,
        way=[(f"Farm {farm}", link(page, places.index)), (package, "")],
        glance=_glance(builds),
        builds=builds,
        more=max(len(summaries.records.numbers(package)) - BUILDS, 0),
        now=channels.builds_in(builds),
        repository=channels.repository.name if channels.repository else "",
        written=now(),
        bars=[_bar(build, most) for build in drawn] if len(drawn) > 1 and most else [],
        bars_words=_bars_words(drawn),
    )


def _glance(builds: Sequence[BuildSummary]) -> str:
    if not builds:
        return "No build of it can be read."
    last = builds[0]
    passed = next((build for build in builds if build.result == "passed"), None)
    match last.result:
        case "running":
            text = "It is being built"
        case "passed":
            text = f"Its last build, of {last.version}, passed in {format_duration(last.seconds)}"
        case _:
            since = f"; the last that passed was build {passed.number}" if passed else ""
            text = f"Its last build, of {last.version}, {_ENDED[last.result]}{since}"
    return f"{text}."


_ENDED = {"failed": "failed", "interrupted": "was interrupted"}


def _bar(build: BuildSummary, most: float) -> _Bar:
    title = f"build {build.number}: {build.result}, {format_duration(build.seconds)}"
    return _Bar(build.result, f"{max(build.seconds / most * 100, 2):.1f}", title)


def _bars_words(builds: Sequence[BuildSummary]) -> str:
    """The drawing in words; builds from the oldest."""
    if not builds:
        return ""
    seconds = [build.seconds for build in builds]
    ends = Counter(build.result for build in builds)
    failed = f", {ends['failed']} of them failed" if ends["failed"] else ""
    return (
        f"The last {len(builds)} builds{failed}, the newest on the right: "
        f"{format_duration(min(seconds))} to {format_duration(max(seconds))}, "
        f"the last one {format_duration(seconds[-1])}"
    )
