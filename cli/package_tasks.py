"""The tasks that ask about a farm's packages, and that rebuild one from its record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cli import options, package_views, views
from cli.command import command
from cli.options import FlagValues
from cli.run import TaskResult, TaskRun
from inventory.errors import Call, UsageError

if TYPE_CHECKING:
    from builds.packages.why import PackagesNow
    from provision.site import Site

_REVISION = "GIT_REVISION, in place of the farm file's."
_PACKAGE = "The package."


@command({"package": _PACKAGE, "revision": _REVISION}, bare="package")
def why(run: TaskRun, package: str = "", revision: str | None = None) -> TaskResult:
    """Tell why a package is to be built: what has changed."""
    from builds.packages.now import asking

    name = options.needed("--package", package, "whose next build is meant")
    with run.site() as site:
        now = _now(site, revision)
        answers = asking(site, now)
        return package_views.why(name, [answers.why(build) for build in now.builds(name)])


@command({"package": _PACKAGE, "revision": _REVISION}, bare="package")
def why_not(run: TaskRun, package: str = "", revision: str | None = None) -> TaskResult:
    """Tell why a package isn't built: what it waits for."""
    from builds.packages.now import asking

    name = options.needed("--package", package, "what is not built")
    with run.site() as site:
        now = _now(site, revision)
        if name in now.unread:
            return package_views.unread(name, now.unread[name])
        answers = asking(site, now)
        return package_views.why_not(name, [answers.why_not(build) for build in now.builds(name)])


@command(
    {
        "package": "Only this package, and what it needs; repeatable.",
        "with_dependants": "And what needs it.",
        "svg": "Write it as an SVG to this file; - is stdout.",
        "revision": _REVISION,
    },
    iterable=["package"],
    bare="package",
)
def graph(
    run: TaskRun, package: FlagValues = None, with_dependants: bool = False, svg: str = "",
    revision: str | None = None,
) -> TaskResult | None:  # fmt: skip
    """Show what is built before what, and how far it is."""
    from builds.packages.now import asking, packages_now

    which = options.names(package, "--package", "a package")
    if with_dependants and not which:
        raise UsageError("--with-dependants: of which package?", remedy="--package NAME")
    with run.site() as site:
        now = packages_now(site, revision)
        only = now.wanted(which, dependants=with_dependants)
        states = None if now.unproven else asking(site, now).states()
        if not svg:
            return package_views.graph(now, only, states)
        from builds.packages.drawing import as_svg

        drawn = as_svg(now.plan.graph, f"packages of farm {site.farm.farm}", states, frozenset(only))
        if svg == "-":
            return TaskResult({"svg": drawn}, drawn)
        return package_views.written(Path(svg).expanduser().absolute(), drawn)


@command({"revision": _REVISION})
def packages(run: TaskRun, revision: str | None = None) -> TaskResult:
    """List the farm's packages, with their last builds."""
    from builds.packages.now import asking, packages_now

    with run.site() as site:
        now = packages_now(site, revision)
        return package_views.packages(now, asking(site, now))


@command(
    {
        "build": "The build, such as hello/7; the package's name alone: its last one.",
        "verify": "Compare what it makes with what the record has, byte by byte.",
    },
    does=("rebuild",),
    bare="build",
)
def rebuild(run: TaskRun, build: str = "", verify: bool = False) -> TaskResult:
    """Build a package again from its record; publish nothing."""
    word = options.needed("--build", build, "a build, as 'packages' lists them")
    run.resume = ("nothing was changed; begin again: ", Call("rebuild", build=word, verify=verify))
    with run.site() as site:
        done = run.perform(
            site, "rebuild", build=word, verify=verify, stream=run.screen.stream
        )  # fmt: skip
        return views.outcome(done) if run.plan else package_views.rebuilt(done.result)


def _now(site: Site, revision: str | None) -> PackagesNow:
    """Raises what keeps anybody from telling what has changed."""
    from builds.packages.now import packages_now

    now = packages_now(site, revision)
    if now.unproven is not None:
        raise now.unproven
    return now
