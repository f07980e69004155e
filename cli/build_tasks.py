"""The task that builds a farm's packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cli import options, views
from cli.command import command
from cli.options import FlagValues
from cli.run import TaskResult, TaskRun
from inventory.errors import Call
from inventory.sizes import format_duration

if TYPE_CHECKING:
    from builds.packages.runs import RunRecord


@command(
    {
        "package": "Build this package, and what it needs; repeatable. Absent: all.",
        "with_dependants": "And what needs it.",
        "revision": "GIT_REVISION: the git revision to build. Another than the last one: all is built.",
        "only_changed": "Build only what has changed, also where GIT_REVISION is another.",
    },
    iterable=["package"],
    does=("build",),
    bare="package",
)
def build(
    run: TaskRun,
    package: FlagValues = None,
    with_dependants: bool = False,
    revision: str | None = None,
    only_changed: bool = False,
) -> TaskResult:
    """Build the packages that changed, and what needs them."""
    from builds.packages.runs import RunRecords

    which = options.names(package, "--package", "a package")
    asked = Call("build", package=which) if which else Call("build")
    run.resume = ("what was built is kept; go on with: ", asked)
    with run.site() as site:
        done = run.perform(
            site, "build", packages=which, with_dependants=with_dependants, revision=revision,
            only_changed=only_changed, stream=run.screen.stream,
        )  # fmt: skip
        if run.plan or not done.result.run:
            return views.outcome(done)
        record = RunRecords(site.paths).find(done.result.run)
        return TaskResult(record.as_dict(), "\n".join(_lines(record)))


def _lines(record: RunRecord) -> list[str]:
    """A run that passed, in words."""
    built = [entry for entry in record.packages if entry.state == "passed"]
    width = max((len(entry.name) for entry in built), default=0)
    lines = [
        f"{entry.name:<{width}}  {entry.package}/{entry.number}  {format_duration(entry.seconds)}"
        for entry in built
    ]
    taken = record.count("taken")
    if taken:
        lines.append(f"{taken} {'is' if taken == 1 else 'are'} as built before")
    if record.generation:
        lines.append(f"{record.repository}: {record.channel} is generation {record.generation} now")
    elif record.flow:
        lines.append(f"{record.repository}: flow {record.flow} has them")
    lines.append(f"in {format_duration(record.seconds)}; record: {record.path}")
    return lines
