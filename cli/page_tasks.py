"""The task of pages."""

from __future__ import annotations

from cli.command import command
from cli.run import TaskResult, TaskRun


@command()
def pages(run: TaskRun) -> TaskResult:
    """Write all pages anew: of builds, packages, the graph, the farm."""
    from builds.pages.places import PagePlaces
    from builds.pages.write import write_all

    with run.site() as site:
        done, index = write_all(site), PagePlaces.of(site.paths).index
        for line in done.unreadable:
            site.reporter.warn(f"it has no page: {line}")
        data = {"page": str(index), "written": done.count, "unreadable": list(done.unreadable)}
        return TaskResult(data, str(index))
