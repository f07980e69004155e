"""What the tasks that ask about packages print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cli.run import TaskResult
from cli.views import table, when
from host.printable import one_line
from inventory.errors import Call, NotFound, Text, UnknownName, did_you_mean, joined, some
from inventory.sizes import format_duration, rounded

if TYPE_CHECKING:
    from builds.packages.record import PackageRecord
    from builds.packages.schedule import PackageState
    from builds.packages.source import SourceState
    from builds.packages.verified import RebuildResult
    from builds.packages.why import Asking, BuildReason, PackagesNow, PackageWhy, PackageWhyNot
    from provision.site import Site

_STEP = "build"
"""What the log of a package's build is called where others are steps' logs."""


def why(package: str, found: Sequence[PackageWhy]) -> TaskResult:
    """A block a build; what each reason comes from is indented below it."""
    lines: list[str] = []
    for one in found:
        last = f"; it last passed as {one.last}" if one.last else ""
        if not one.reasons:
            lines.append(f"{one.build}: nothing has changed: it is as it was built in {one.last}")
        elif one.certain:
            lines.append(f"{one.build} is built{last}:")
        else:
            lines.append(f"{one.build} is built if what it needs comes out otherwise{last}:")
        lines += _reasons(one.reasons, 1)
    builds = [{**asdict(one), "certain": one.certain} for one in found]
    return TaskResult({"package": package, "builds": builds}, "\n".join(lines))


def _reasons(reasons: Sequence[BuildReason], depth: int) -> Iterator[str]:
    for one in reasons:
        yield f"{'  ' * depth}{one_line(one.text)}"
        yield from _reasons(one.because, depth + 1)


def why_not(package: str, found: Sequence[PackageWhyNot]) -> TaskResult:
    lines: list[Text] = []
    for one in found:
        if one.built:
            lines.append(f"{one.build} is built: {one.built} is as it would be built now")
        elif not one.hindrances:
            lines.append((f"nothing keeps {one.build} from being built: ", _build(one.package)))
        else:
            lines.append(f"{one.build} is not built:")
        for each in one.hindrances:
            lines.append(f"  {one_line(each.text)}")
            lines += (f"    {one_line(more)}" for more in each.more)
    builds = [asdict(one) for one in found]
    return TaskResult({"package": package, "builds": builds}, joined(lines, "\n"))


def unread(package: str, why_: str) -> TaskResult:
    """Of a package whose source can't be read."""
    hindrance = {"kind": "source", "text": why_, "build": package, "more": ()}
    data = {"package": package, "builds": [{"build": package, "built": "", "hindrances": [hindrance]}]}
    return TaskResult(data, f"{package} is not built:\n  {one_line(why_)}")


def _build(package: str) -> Call:
    return Call("build", package=(package,))


def graph(
    now: PackagesNow, only: Sequence[str], states: Mapping[str, PackageState] | None
) -> TaskResult:
    """Layers, with states and what each waits for; then what is in the way of all."""
    from builds.packages.drawing import as_text

    drawn, chosen = now.plan.graph, frozenset(only)
    notes = [one_line(text) for text in now.unread.values()]
    if now.unknown:
        notes.append(
            f"what these need is not known before a builder has read their spec files: "
            f"{some(tuple(now.unknown))}"
        )
    if now.unproven is not None:
        notes.append(f"what is built already can't be told: {now.unproven.message}")
    layers = [[name for name in layer if name in chosen] for layer in drawn.layers]
    data = {
        "layers": [layer for layer in layers if layer],
        "builds": [
            {
                "build": name, "package": now.package(name), "state": (states or {}).get(name),
                "needs": [
                    {"build": need.needs, "direct": need.direct, "because": list(map(str, need.steps))}
                    for need in drawn.needs(name)
                ],
            }
            for name in only
        ],
        "problems": [*map(str, drawn.problems), *now.unread.values()],
        "unknown": list(now.unknown),
    }  # fmt: skip
    text = as_text(drawn, states, chosen).rstrip("\n") if only else "there is no package"
    return TaskResult(data, "\n".join([text, *notes]))


def written(path: Path, drawn: str) -> TaskResult:
    from host.files import write_atomic

    write_atomic(path, drawn.encode())
    return TaskResult({"svg": str(path)}, f"{path} written")


def packages(now: PackagesNow, answers: Asking) -> TaskResult:
    """A line a build; what can't be told of yet is last."""
    states = {} if now.unproven else answers.states()
    rows: list[tuple[str, ...]] = []
    data: list[dict[str, object]] = []
    for build, node in now.plan.graph.builds.items():
        state, last = now.plan.state(node), answers.last(build)
        rows.append((build, state.given, states.get(build, ""), *_last(last)))
        data.append(
            {
                **_package(build, state, states.get(build, "")),
                "last": last.id if last else None, "last_version": last.version if last else None,
                "result": last.result if last else None,
                "ended": (last.ended or last.started) if last else None,
                "failure": last.failure if last else "", "message": last.message if last else "",
            }
        )  # fmt: skip
    for name, state in now.unknown.items():
        rows.append((name, state.given, "", "", "", "", "", "its spec file was not read yet"))
        data.append(_package(name, state, ""))
    for name, text in now.unread.items():
        rows.append((name, "", "unread", "", "", "", "", text))
        data.append({"build": name, "package": name, "state": "unread", "message": text})
    if not rows:
        return TaskResult({"packages": data}, "the farm has no package yet: name some in 'packages'")
    headings = ("PACKAGE", "VERSION", "STATE", "LAST BUILD", "OF", "ENDED", "WHEN", "NOTE")
    lines = [table(headings, rows)]
    if now.unproven is not None:
        lines.append(f"what is built already can't be told: {now.unproven.message}")
    return TaskResult({"packages": data}, "\n".join(lines))


def _package(build: str, state: SourceState, known: str) -> dict[str, object]:
    return {
        "build": build, "package": state.name, "format": state.format, "version": state.given,
        "state": known, "place": state.place, "commit": state.commit,
    }  # fmt: skip


def _last(record: PackageRecord | None) -> tuple[str, ...]:
    """Its id, version, end, when that was, and what was the matter."""
    if record is None:
        return ("",) * 5
    note = f"{record.failure}: {record.message}" if record.failure else record.message
    moment = _local(record.ended or record.started)
    return record.id, record.version, record.result, moment, note.partition("\n")[0]


def _local(text: str) -> str:
    """A record's time; as it stands there, if it is none."""
    try:
        return when(datetime.fromisoformat(text))
    except ValueError:
        return one_line(text, 40)


def rebuilt(found: RebuildResult) -> TaskResult:
    """Whether it came out the same, and else what differs."""
    took = format_duration(found.seconds)
    lines: list[Text] = [f"{found.build} built again in {took}: {found.directory}"]
    lines += (f"note: {one_line(note)}" for note in found.notes)
    if not found.compared:
        lines.append(("whether it is the same: ", Call("rebuild", build=found.build, verify=True)))
        return TaskResult(asdict(found), joined(lines, "\n"))
    if not found.differences:
        files = f"{found.files} file{'s' * (found.files != 1)}"
        lines.append(f"identical: {files}, byte for byte as {found.build} made them")
        return TaskResult({**asdict(found), "identical": True}, joined(lines, "\n"))
    lines += map(one_line, found.differences)
    count = len(found.differences)
    problem = f"{found.build} does not come out the same: {count} difference{'s' * (count != 1)}"
    return TaskResult({**asdict(found), "identical": False}, joined(lines, "\n"), False, problem)


# ---- A build's record.


def log(site: Site, build: str, step: str) -> TaskResult:
    """What the task `log` shows of a package's build: its record, or with ``step`` one of its logs:
    ``build``, or that of an attempt before. NotFound."""
    from builds.packages.record import PackageRecords

    record = PackageRecords(site.paths).find(build)
    return _log(record, step) if step else package_record(record)


def package_record(record: PackageRecord) -> TaskResult:
    """From what it was built, where, and what came out."""
    from builds.packages.verified import verified

    source, builder, inputs = record.source, record.builder, record.inputs
    commit = f" {source.commit[:12]}" if source.commit else ""
    subject = f"  {one_line(source.subject)}" if source.subject else ""
    lines: list[Text] = [
        f"build {record.id}  {record.name} {record.version}: {record.result}, "
        f"{_local(record.started)}, {format_duration(record.seconds)}",
        f"source {source.place}{commit}{subject}",
    ]
    lines += (f"because {one_line(text)}" for text in record.why)
    if builder.vm:
        lines.append(f"on {builder.vm}, {inputs.template}")
    if count := len(inputs.installed):
        had = f"{count} package{'s' * (count != 1)} installed"
        of = f"generation {record.generation} of {record.repository}"
        ours = f", {len(inputs.ours)} of them from {of}" if inputs.ours else ""
        lines.append(f"with {had}{ours}")
    lines += (
        f"attempt {number} on {one.vm}: {one.failure}: {one_line(one.message)}"
        for number, one in enumerate(record.attempts, 1)
    )
    if record.unchanged:
        lines.append(f"what it made is what {record.package}/{record.unchanged} made")
    if record.outputs:
        files = [(f.name, rounded(f.size), f.sha256) for f in record.outputs]
        lines += ["", table(("FILE", "SIZE", "SHA256"), files)]
    again = verified(record.directory)
    if again is not None:
        came = "came out the same" if again.identical else "came out otherwise"
        lines += ["", f"built again {_local(again.at)}: {came}"]
        lines += (f"  {one_line(text)}" for text in again.differences)
    if record.result == "failed":
        lines += ["", f"{record.failure}: {one_line(record.message)}"]
        if record.tail:
            lines += ["", "the last lines:", *(f"  {x}" for x in record.tail.splitlines()[-15:])]
        if record.remedy:
            lines += ["", ("what to do: ", record.remedy)]
    lines += ["", *(f"note: {one_line(note)}" for note in record.notes)]
    lines.append(("its log: ", Call("log", build=record.id, step=_STEP)))
    lines.append(f"record: {record.path}")
    data = {**record.as_dict(), "verified": None if again is None else asdict(again)}
    return TaskResult(data, joined(lines, "\n"))


def _log(record: PackageRecord, step: str) -> TaskResult:
    from builds.log_text import log_lines
    from builds.packages.record import LOG

    known = {_STEP: record.directory / LOG}
    known |= {one.directory: record.directory / one.directory / LOG for one in record.attempts}
    if step not in known:
        raise UnknownName(
            f"build {record.id} has no log of {step!r}",
            remedy=did_you_mean(step, known, f"it has {', '.join(known)}"),
        )
    try:
        text = known[step].read_bytes().decode(errors="replace")
    except OSError:
        raise NotFound(f"build {record.id} left no log: {record.result}") from None
    data = {"build": record.id, "step": step, "log": str(known[step]), "text": text}
    return TaskResult(data, "\n".join(log_lines(text, frozenset())))
