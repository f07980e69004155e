"""What the tasks of package repositories print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cli.run import TaskResult
from cli.views import table, when
from inventory.errors import Text, joined, some
from inventory.sizes import rounded

if TYPE_CHECKING:
    from builds.packages.record import PackageRecord
    from builds.record import BuildRecord
    from provision.repository_queue import QueueEvent
    from repositories.check import Report
    from repositories.difference import Difference
    from repositories.flows.flow import Flow
    from repositories.generation import Generation
    from repositories.package import Package
    from repositories.repository import Repository


def channels(repositories: Sequence[Repository]) -> TaskResult:
    """Each repository with its channels."""
    rows: list[tuple[str, ...]] = []
    data: list[dict[str, object]] = []
    for repository in repositories:
        for channel in repository.settings.channels:
            head = repository.head(channel)
            log = repository.documents.log(channel)
            rows.append(
                (
                    repository.name, repository.settings.format, channel,
                    str(head.sequence) if head else "-", str(head.count) if head else "-",
                    rounded(head.size) if head else "", when(log[-1].at) if log else "",
                    log[-1].verb if log else "", log[-1].by if log else "",
                )
            )  # fmt: skip
            data.append(
                {
                    "repository": repository.name, "format": repository.settings.format,
                    "channel": channel, "generation": head.sequence if head else None,
                    "packages": head.count if head else 0, "size": head.size if head else 0,
                    "path": str(repository.layout.top),
                }
            )  # fmt: skip
    headings = (
        "REPOSITORY",
        "FORMAT",
        "CHANNEL",
        "GENERATION",
        "PACKAGES",
        "SIZE",
        "SINCE",
        "BY",
        "WHO",
    )
    return TaskResult({"channels": data}, table(headings, rows))


def packages(repository: Repository, generation: Generation, found: Sequence[Package]) -> TaskResult:
    rows = [(p.name, p.version, p.architecture, p.component, rounded(p.size), p.build) for p in found]
    head = f"{_of(repository, generation)}: {len(found)} packages"
    text = table(("PACKAGE", "VERSION", "ARCH", "COMPONENT", "SIZE", "BUILD"), rows) if rows else ""
    data = {**_generation(repository, generation), "packages": [_package(p) for p in found]}
    return TaskResult(data, f"{head}\n{text}".rstrip())


def generation(repository: Repository, one: Generation, reasons: Sequence[str]) -> TaskResult:
    lines = [
        _of(repository, one),
        f"made      {when(one.made)} by {one.by} ({one.verb})",
        f"packages  {one.count}, {rounded(one.size)}",
        f"from      {_from(one)}",
        f"needed    {some(reasons) if reasons else 'by nobody: repo-gc removes it'}",
        f"tree      {repository.layout.tree(one.sequence)}",
    ]
    if one.note:
        lines.append(f"note      {one.note}")
    data = {**_generation(repository, one), "needed": list(reasons)}
    return TaskResult(data, "\n".join(lines))


def differences(
    repository: Repository, one: Generation, other: Generation, found: Sequence[Difference]
) -> TaskResult:
    lines: list[Text] = [f"{_of(repository, one)} -> {_of(repository, other)}"]
    for each in found:
        lines.append(f"{each.what:<8} {each}")
        for change in each.changes:
            lines.append(f"         {change.version}  {change.author}")
            lines += [f"           {line}" for line in change.lines]
    if not found:
        lines.append("the same packages")
    data = {
        "before": one.sequence, "after": other.sequence,
        "differences": [
            {
                "what": d.what, "name": d.one.name, "architecture": d.one.architecture,
                "before": d.before.version if d.before else None,
                "after": d.after.version if d.after else None,
                "changes": [
                    {"version": c.version, "author": c.author, "lines": list(c.lines)}
                    for c in d.changes
                ],
            }
            for d in found
        ],
    }  # fmt: skip
    return TaskResult(data, joined(lines, "\n"))


def log(repository: Repository, channel: str) -> TaskResult:
    entries = repository.documents.log(channel)[::-1]
    rows = [(when(e.at), str(e.sequence), str(e.before or ""), e.verb, e.by, e.note) for e in entries]
    headings = ("WHEN", "GENERATION", "BEFORE", "BY", "WHO", "NOTE")
    text = table(headings, rows) if rows else f"nothing was published in {channel} yet"
    data = [
        {
            "at": e.at.isoformat(), "generation": e.sequence, "before": e.before or None,
            "verb": e.verb, "by": e.by, "note": e.note,
        }
        for e in entries
    ]  # fmt: skip
    return TaskResult({"repository": repository.name, "channel": channel, "log": data}, text)


def checked(repository: Repository, report: Report) -> TaskResult:
    head = (
        f"{repository.name}: {report.generations} generations, {report.packages} packages, "
        f"{rounded(report.bytes)} read"
    )
    lines: list[Text] = [f"{head}: {'all is right' if not report.findings else ''}".rstrip(": ")]
    lines += [
        joined((f"{f.where}: {f.what}", *((f.remedy,) if f.remedy else ())), "; ")
        for f in report.findings
    ]
    data = {
        "repository": repository.name, "generations": report.generations,
        "packages": report.packages, "bytes": report.bytes,
        "findings": [{"where": f.where, "what": f.what, "remedy": f.remedy} for f in report.findings],
    }  # fmt: skip
    wrong = len(report.findings)
    problem = f"{repository.name}: {wrong} thing{'s are' if wrong > 1 else ' is'} wrong" if wrong else ""
    return TaskResult(data, joined(lines, "\n"), ok=not wrong, problem=problem)


class _Origin(NamedTuple):
    """What a record tells of a package's origin, in words but for the last two."""

    build: str
    source: str
    commit: str
    templates: tuple[str, ...]


def _origin(record: BuildRecord | PackageRecord) -> _Origin:
    from builds.record import BuildRecord

    source = record.source
    if isinstance(record, BuildRecord):
        place, said = record.source.repository, record.verdict
        templates = dict.fromkeys(vm.template for vm in record.vms if vm.template)
    else:
        place, said = record.source.place, record.result
        templates = dict.fromkeys(filter(None, [record.builder.template]))
    text = f"{place} {source.commit} {source.subject}".rstrip()
    return _Origin(f"{record.id}: {said}", text, source.commit, tuple(templates))


def origins(
    repository: Repository,
    found: Sequence[Package],
    records: Mapping[str, BuildRecord | PackageRecord | None],
    first: Mapping[Package, Generation | None],
) -> TaskResult:
    """Where each package came from."""
    lines: list[str] = []
    data: list[dict[str, object]] = []
    for package in found:
        record, since = records[package.build], first[package]
        lines += [str(package), f"  sha256    {package.sha256}"]
        if since:
            which = f"generation {since.sequence} of {since.channel}"
            lines.append(f"  since     {which}, {when(since.made)}, by {since.by}")
        origin = _origin(record) if record else None
        if origin:
            lines += [
                f"  build     {origin.build}", f"  source    {origin.source}",
                f"  template  {', '.join(origin.templates)}",
            ]  # fmt: skip
        else:
            gone = f"{package.build}, whose record is gone" if package.build else ""
            lines.append(f"  build     {gone or 'none: it was added by hand'}")
        data.append(
            {
                **_package(package),
                "since": since.sequence if since else None,
                "commit": origin.commit if origin else None,
                "templates": list(origin.templates) if origin else [],
            }
        )
    return TaskResult({"repository": repository.name, "packages": data}, "\n".join(lines))


def queue_event(event: QueueEvent, *, plan: bool) -> Text:
    what = f"would be {event.what}" if plan else event.what
    return joined((f"{event.channel}: {event.name} {what}: ", event.text), "")


def queued(events: Sequence[QueueEvent], *, plan: bool) -> TaskResult:
    """What a turn of a queue did; each line was told already."""
    counts = Counter(event.what for event in events)
    would = "would be " if plan else ""
    problem = ", ".join(f"{counts[w]} {would}{w}" for w in ("rejected", "left") if counts[w])
    data = [{"what": e.what, "channel": e.channel, "name": e.name, "text": e.text} for e in events]
    text = "" if events else "nothing is there, and nothing is due"
    return TaskResult({"events": data}, text, ok=not problem, problem=problem)


def _of(repository: Repository, one: Generation) -> str:
    return f"{repository.name}: generation {one.sequence} of {one.channel}"


def _from(one: Generation) -> str:
    if one.origin:
        return f"the packages of generation {one.origin}"
    return f"generation {one.base}" if one.base else "nothing before"


def _generation(repository: Repository, one: Generation) -> dict[str, object]:
    return {
        "repository": repository.name, "generation": one.sequence, "channel": one.channel,
        "made": one.made.isoformat(), "by": one.by, "verb": one.verb, "base": one.base or None,
        "origin": one.origin or None, "note": one.note, "count": one.count, "size": one.size,
        "tree": str(repository.layout.tree(one.sequence)),
    }  # fmt: skip


def _package(package: Package) -> dict[str, object]:
    return {
        "name": package.name, "version": package.version, "architecture": package.architecture,
        "component": package.component, "sha256": package.sha256, "size": package.size,
        "file": package.place, "source": package.source, "build": package.build,
    }  # fmt: skip


def flows(repository: Repository, found: Sequence[Flow]) -> TaskResult:
    rows = [
        (
            flow.name, flow.state, flow.channel, str(flow.base or "-"),
            str(flow.to_test if flow.state == "open" else flow.result or "-"),
            str(len(flow.packages)), when(flow.began), flow.by,
            "being bisected" if flow.bisection else "",
        )
        for flow in found
    ]  # fmt: skip
    headings = ("FLOW", "STATE", "TO", "BASE", "GENERATION", "PACKAGES", "SINCE", "WHO", "NOTE")
    text = table(headings, rows) if rows else f"{repository.name}: no flow is open"
    return TaskResult({"flows": [_flow(repository, flow) for flow in found]}, text)


def flow(repository: Repository, one: Flow) -> TaskResult:
    """What it is, and all that was found out of it."""
    head = f"{repository.name}: flow {one.name} to {one.channel}: {one.state}"
    lines = [head, f"begun     {when(one.began)} by {one.by}"]
    if one.state == "open":
        lines.append(f"base      generation {one.base}" if one.base else "base      nothing yet")
        url = repository.settings.url
        where = f", {url}/generations/{one.to_test}/" if url else ""
        part = " (a part of the packages)" if one.trial else ""
        lines.append(f"to test   generation {one.to_test}{part}{where}")
    elif one.result:
        lines.append(f"result    generation {one.result}")
    lines += _listed("packages", one.packages)
    lines += _listed("fail", one.out)
    for run in one.runs:
        verdict = "passed" if run.passed else "failed"
        build = f" in build {run.build} on {', '.join(run.vms)}" if run.build else ""
        note = f": {run.note}" if run.note else ""
        lines.append(
            f"tested    {when(run.at)} generation {run.generation} {verdict}{build}, {run.by}{note}"
        )
    if one.note:
        lines.append(f"note      {one.note}")
    return TaskResult(_flow(repository, one), "\n".join(lines))


def _listed(heading: str, packages: Sequence[Package]) -> list[str]:
    return [f"{heading if not n else '':<8}  {package}" for n, package in enumerate(packages)]


def _flow(repository: Repository, one: Flow) -> dict[str, object]:
    return {
        "repository": repository.name, "flow": one.name, "state": one.state, "channel": one.channel,
        "base": one.base or None, "candidate": one.candidate,
        "to_test": one.to_test if one.state == "open" else None, "result": one.result or None,
        "by": one.by, "began": one.began.isoformat(),
        "ended": one.ended.isoformat() if one.ended else None, "note": one.note,
        "packages": [_package(p) for p in one.packages], "fail": [_package(p) for p in one.out],
        "runs": [
            {
                "generation": run.generation, "passed": run.passed, "at": run.at.isoformat(),
                "by": run.by, "build": run.build, "vms": list(run.vms), "note": run.note,
            }
            for run in one.runs
        ],
    }  # fmt: skip
