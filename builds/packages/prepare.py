"""All that is in the way of a build of packages, told at once."""

from __future__ import annotations

from builds.packages.graph import Graph
from builds.packages.sources import PackageSources
from inventory.errors import WrongState, some
from provision.site import Site


def check_all(site: Site, sources: PackageSources, graph: Graph) -> None:
    """WrongState: something is in the way."""
    if sources.problems:
        lines = list(map(str, sources.problems))
        raise WrongState(
            f"{site.name}: the packages can't be built: {some(lines, by='; ')}",
            remedy=sources.problems[0].remedy,
            detail="\n".join(lines) if len(lines) > 1 else "",
        )
    graph.schedule()
