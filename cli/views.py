"""Results as text: aligned, and readable in a narrow terminal too."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, TextIO

from cli.run import TaskResult
from cli.streams import columns
from host.printable import one_line, printable
from inventory.endings import ENVIRONMENT
from inventory.errors import BuildFailed, Call, FarmhandError, Text, did_you_mean, joined, some
from inventory.sizes import about, brief, format_duration, format_size, rounded
from provision.engine.report import UNCHANGING

if TYPE_CHECKING:
    from builds.record import BuildRecord, StepRecord
    from host.paths import FarmPaths
    from hypervisors.api import Template
    from hypervisors.ownership import FarmIdentity
    from provision.engine.record import Record
    from provision.engine.report import Action, Outcome
    from provision.network.apply import ApplyResult
    from provision.network.rendered import Rendered
    from provision.network.verify import Answer, VerifyReport
    from provision.operations.balloon import MemoryPlan
    from provision.operations.checkpoint_remove import KeptState
    from provision.status import FarmStatus, HostStatus, VmStatus

_INDENT = " " * 9  # of a script's lines


def outcome(
    result: Outcome[object], *, nothing: str = "nothing to do: all is as it should be"
) -> TaskResult:
    """What was done, or would be, one line an action."""
    if not result.actions:
        return TaskResult(result.as_dict(), nothing)
    widest = max(len(action.vm) for action in result.actions)
    changing = "would" if result.planned else "done"
    lines = [
        joined(
            (
                f"{f'{changing if a.verb not in UNCHANGING else a.verb}:':<6} ",
                f"{a.vm:<{widest}}  " if widest else "",
                a.text,
                *(f"\n{line}" for line in _script_lines(a) if result.planned),
            ),
            "",
        )
        for a in result.actions
    ]
    return TaskResult(result.as_dict(), joined(lines, "\n"))


def _script_lines(action: Action) -> Iterator[str]:
    for number, script in enumerate(action.scripts, 1):
        if len(action.scripts) > 1:
            yield f"{_INDENT}-- script {number} of {len(action.scripts)}"
        for line in script.rstrip("\n").split("\n"):
            yield f"{_INDENT}{printable(line)}".rstrip()


def width(stream: TextIO | None = None) -> int:
    """Columns of the terminal that stdout, or another stream, is; where it is none, no limit."""
    stream = stream or sys.stdout
    return columns(stream, 200) if stream.isatty() else 10_000


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO | None = None) -> str:
    """Aligned columns, empty ones left out; one block a row where the terminal is too narrow."""
    used = [i for i in range(len(headings)) if i == 0 or not rows or any(row[i] for row in rows)]
    headings = [headings[i] for i in used]
    rows = [[one_line(row[i]) for i in used] for row in rows]  # as wide as what is shown
    widths = [max(len(str(cell)) for cell in column) for column in zip(headings, *rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) <= width(stream):
        return "\n".join(
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in (headings, *rows)
        )
    label = max(len(h) for h in headings[1:])
    blocks = []
    for row in rows:
        blocks.append(row[0])
        blocks += [
            f"  {h.lower():<{label}}  {cell}"
            for h, cell in zip(headings[1:], row[1:], strict=True)
            if cell
        ]
    return "\n".join(blocks)


def doomed(plan: Outcome[object], status: FarmStatus) -> tuple[object, Text]:
    """What a whole farm's destroy would take: a value to compare, and the text for stderr; no text where
    there is nothing. The plan's lines, with what is known of each VM in place of its own."""
    if not plan.changed:
        return (), ""
    known = {vm.vm: vm for vm in status.vms}
    going = [known[a.vm] for a in plan.actions if a.verb == "destroy" and a.vm in known]
    rest = [a for a in plan.actions if a.verb != "destroy" or a.vm not in known]
    rows = [
        (
            vm.vm,
            vm.state,
            ", ".join(vm.checkpoints),
            "" if vm.disk_used is None else rounded(vm.disk_used),
        )
        for vm in going
    ]
    headings = ("VM", "STATE", "CHECKPOINTS", "DISK")
    parts: list[Text] = [f"farm {status.farm} ({status.file}): all of this goes, for good"]
    if rows:
        parts += ["", table(headings, rows, sys.stderr)]
    if rest:
        parts += ["", outcome(replace(plan, actions=tuple(rest))).text]
    what = (plan.actions, tuple((vm.vm, vm.state, vm.checkpoints) for vm in going))
    return what, joined(parts, "\n")


def templates(found: Sequence[Template], ours: FarmIdentity) -> TaskResult:
    """``ours``: whose list it is; another farm's are named."""
    data = {
        "templates": [
            {
                "label": t.label,
                "size": t.size,
                "sha256": t.sha256,
                "created": t.created.isoformat(),
                "origin": t.origin,
                "firstboot": t.firstboot,
                "ours": t.farm == ours,
                "farm": str(t.farm),
            }
            for t in found
        ]
    }
    if not found:
        return TaskResult(data, "no template yet: clone-farm makes what it needs")
    rows = [
        (t.label, format_size(t.size), when(t.created), t.firstboot, t.origin, t.sha256[:12])
        for t in found
        if t.farm == ours
    ]
    parts: list[Text] = []
    if rows:
        parts = [table(("TEMPLATE", "SIZE", "MADE", "FIRST BOOT", "FROM", "SHA256"), rows)]
    parts += [f"{t.label} is another farm's, not used: {t.farm}" for t in found if t.farm != ours]
    return TaskResult(data, joined(parts, "\n"))


def checkpoints(found: Sequence[KeptState]) -> TaskResult:
    """One line each; the one that the disk grows from is told."""
    data = {"checkpoints": [one.as_dict() for one in found]}
    if not found:
        return TaskResult(data, "no checkpoints: no VM with a disk of the farm's own is made")
    rows = [
        (
            one.vm,
            one.checkpoint.name,
            when(one.checkpoint.created),
            "disk and memory" if one.checkpoint.warm else "disk",
            _is_clean(one),
            "the disk grows from it" if one.current else "",
        )
        for one in found
    ]
    return TaskResult(data, table(("VM", "CHECKPOINT", "MADE", "KEEPS", "TEMPLATE", "NOW"), rows))


def _is_clean(kept: KeptState) -> str:
    """What it is, of the template's own and of what the VM's ``clean`` is."""
    if kept.clean is None:
        return kept.template if kept.checkpoint.name == "clean" else ""
    return kept.clean.words if kept.checkpoint.name == "clean" else f"{kept.clean.words}: its clean"


def when(moment: datetime) -> str:
    """Local time, to the minute."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


def _warm(host: HostStatus) -> str:
    return {"mapped": ", warm resets: mapped", "read": ", warm resets: read back"}.get(host.warm, "")


def _free(host: HostStatus) -> str:
    return f", {rounded(host.free)} free" if host.free is not None else ""


def farm_status(status: FarmStatus) -> TaskResult:
    """One line a VM, then who is at work and what wants a look."""
    head = f"farm {status.farm} ({status.file})"
    hosts = [
        f"host {h.host}: " + (h.error or "; ".join((f"{h.driver}{_warm(h)}{_free(h)}", *h.notes)))
        for h in status.hosts
    ]
    rows = [
        (
            vm.vm,
            vm.state if vm.answers is not False else f"{vm.state}, silent",
            _memory(vm.memory, vm.memory_max)
            + (f" ({rounded(vm.memory_shared)} shared)" if vm.memory_shared else ""),
            vm.template,
            _checkpoint(vm),
            "" if vm.disk_used is None else rounded(vm.disk_used),
            f"{vm.address}:{vm.port}" if vm.address and vm.port else vm.address,
        )
        for vm in status.vms
    ]
    headings = ("VM", "STATE", "MEMORY", "TEMPLATE", "CHECKPOINT", "DISK", "SSH")
    lines: list[Text] = [head, *hosts, "", table(headings, rows)]
    notes: list[Text] = [f"host {h.host}: {note}" for h in status.hosts for note in h.disk_notes]
    notes += [text for h in status.hosts for text in h.others]
    notes += [joined((vm.vm, text), ": ") for vm in status.vms for text in (vm.error, vm.note) if text]
    notes += [
        (f"{vm.vm}: runs, but its ssh gave no answer within a second; see ", Call("console", vm=vm.vm),
         "; to put it back: ", Call("reset", vm=vm.vm))
        for vm in status.vms if vm.answers is False
    ]  # fmt: skip
    notes += [
        f"{vm.vm}: full in its guest: {one_line(text)}" for vm in status.vms for text in vm.full or ()
    ]
    changed = "the farm file has changed; until its next start it goes on with"
    notes += [f"{vm.vm}: {changed} {'; '.join(vm.kept)}" for vm in status.vms if vm.kept]
    notes += [f"{vm.vm}: {text}" for vm in status.vms for text in vm.memory_troubles]
    tooled = [vm for vm in status.vms if vm.clean and vm.clean != vm.template]
    notes += [f"{vm.vm}: its clean is {vm.clean}" for vm in tooled]
    notes += [f"{holder.lock}: {holder}" for holder in status.holders]
    left = "the next command finishes or undoes"
    notes += [joined((left, text), ": ") for text in status.unfinished]
    notes += list(status.warnings)
    if notes:
        lines += ["", *notes]
    if status.vms and all(vm.state == "not made" for vm in status.vms):
        lines += ["", ("nothing is made yet: ", Call("clone-farm"), " makes it")]
    unseen = [host.host for host in status.hosts if host.error]
    return _looked(status.as_dict(), joined(lines, "\n"), unseen, of=len(status.hosts))


def _looked(data: Mapping[str, object], text: Text, unseen: Sequence[str], *, of: int) -> TaskResult:
    """The result of a look at hosts. ``unseen``: those that could not be looked at, of so many; the text
    says why."""
    if not unseen:
        return TaskResult(data, text)
    problem = f"{len(unseen)} of {of} hosts could not be looked at: {some(unseen)}"
    remedy = (Call("doctor"), " says more")
    return TaskResult(data, text, ok=False, problem=problem, remedy=remedy, ending=ENVIRONMENT)


def _checkpoint(vm: VmStatus) -> str:
    """What its disk grew from, and what it is now."""
    words = ["warm"] if vm.checkpoint in vm.warm else []
    words += [vm.condition] if vm.condition else []
    if not vm.checkpoint:
        return vm.condition
    return f"{vm.checkpoint} ({', '.join(words)})" if words else vm.checkpoint


def memory_plan(found: MemoryPlan) -> TaskResult:
    """A block for each host: what its VMs have, may have, and could give."""
    blocks = [f"host {host}: {error}" for host, error in found.errors.items()]
    for name, host in found.hosts.items():
        may = "no limit declared" if host.limit is None else f"{brief(host.limit)} for this farm's VMs"
        parts = [f"host {name}: {may}", f"{brief(host.in_use)} in use"]
        if host.free is not None:
            parts.append(f"the machine has {about(host.free)} free")
        if host.left is not None:
            over = host.left < 0
            parts.append(f"{brief(abs(host.left))} {'too much' if over else 'left'}")
        rows = [
            (
                seen.guest.vm,
                brief(seen.guest.now) if seen.guest.now else "-",
                "" if seen.guest.least is None else about(seen.guest.least),
                "" if seen.guest.idle is None else brief(seen.guest.idle),
                brief(seen.guest.maximum),
                brief(seen.grow_to) if seen.grow_to else "-",
                brief(seen.guest.gives) if seen.guest.gives else "",
                seen.why,
            )
            for seen in found.prospects(name)
        ]
        headings = ("VM", "HAS", "NEEDS", "IDLE", "MAXIMUM", "MAY HAVE", "COULD GIVE", "")
        blocks.append(f"{', '.join(parts)}\n\n{table(headings, rows)}")
    of = len(found.hosts) + len(found.errors)
    return _looked(found.as_dict(), "\n\n".join(blocks), list(found.errors), of=of)


def _memory(now: int | None, most: int | None) -> str:
    if most is None:
        return "" if now is None else rounded(now)
    return f"{rounded(now)} of {rounded(most)}" if now and now != most else rounded(most)


def history(
    operations: Sequence[Record],
    builds: Sequence[BuildRecord],
    limit: int,
    unreadable: Mapping[str, FarmhandError] | None = None,
    *,
    sought: bool = False,
) -> TaskResult:
    """Operations and builds as one list, newest first. ``unreadable``: builds whose records can't be
    read, with what is wrong. ``sought``: they were chosen from others."""
    from builds.operation import CYCLE

    unreadable = unreadable or {}
    data = {
        "operations": [operation.as_dict() for operation in operations],
        "builds": [build.as_dict() for build in builds[:limit]],
        "unreadable_builds": {build: error.message for build, error in unreadable.items()},
    }
    lines: list[tuple[datetime, tuple[str, ...]]] = []
    for o in operations:
        if o.verb == CYCLE.name:  # stands below as the build it made
            continue
        took = ""
        if o.ended is not None and o.ended >= o.started:  # else the clock was set back meanwhile
            took = format_duration((o.ended - o.started).total_seconds())
        on, ended, why = some(o.vms), o.state, o.error.partition("\n")[0]
        row = (when(o.started), o.verb, on, "", "", "", str(o.requester), ended, took, why)
        lines.append((o.started, row))
    for b in builds[:limit]:
        moment = datetime.fromisoformat(b.started)
        took = format_duration(b.seconds) if b.ended else ""
        of, subject = b.source, one_line(b.source.subject, _SUBJECT)
        row = (
            when(moment), "build", b.id, of.version, of.branch, subject, str(b.requester), b.verdict,
            took, _why(b),
        )  # fmt: skip
        lines.append((moment, row))
    notes: Text = joined(
        ((error.message, ": ", error.remedy) for error in [*unreadable.values()][:limit]), "\n"
    )
    if not lines:
        nothing = "nothing like that was done" if sought else "nothing was done to this farm yet"
        return TaskResult(data, notes or nothing)
    rows = [row for _, row in sorted(lines, key=lambda line: line[0], reverse=True)[:limit]]
    headings = ("WHEN", "WHAT", "ON", "VERSION", "BRANCH", "SUBJECT", "BY", "ENDED", "TOOK", "NOTE")
    text = table(headings, rows)
    return TaskResult(data, (text, "\n\n", notes) if notes else text)


_SUBJECT = 40
"""Characters of it in a list."""


def _why(record: BuildRecord) -> str:
    """Of a build that didn't pass: where, which class, what."""
    step = record.failed_step
    if step is None:
        return ""
    kind = f" ({step.failure})" if step.failure else ""
    return f"{step.name}{kind}{': ' if step.message else ''}{step.message}"


def _of_step(step: StepRecord) -> str:
    """What there is to say beside how it ended."""
    if step.done_in:
        return f"passed in build {step.done_in}"
    if step.unverified:
        return "not verified"
    return f"{step.failure}{': ' if step.failure else ''}{step.message.partition(chr(10))[0]}"


def build_record(record: BuildRecord) -> TaskResult:
    """A build's steps, what came out, where the record is."""
    moment = when(datetime.fromisoformat(record.started))
    source = record.source
    lines: list[Text] = [
        f"build {record.id}  {record.verdict}, {moment}, {format_duration(record.seconds)}"
    ]
    if source.commit or source.repository:
        subject = f"  {one_line(source.subject)}" if source.subject else ""
        commit = "commit not verified" if source.unverified else source.commit[:12]
        words = (source.repository, source.branch, commit, source.version)
        lines.append(f"source {' '.join(map(one_line, filter(None, words)))}{subject}")
    lines += [
        f"{used.vm} used generation {used.generation} of {used.repository}'s {used.channel}"
        for used in record.repositories
    ]
    rows = [
        (
            step.name,
            f"{step.vm} -> {step.to}" if step.to else step.vm,
            step.status,
            format_duration(step.seconds) if step.status not in ("waiting", "skipped") else "",
            _of_step(step),
        )
        for step in record.steps
    ]
    lines += ["", table(("STEP", "VM", "ENDED", "TOOK", "NOTE"), rows)]
    if record.outputs:
        files = [(f.name, rounded(f.size), f.sha256) for f in record.outputs]
        lines += ["", table(("FILE", "SIZE", "SHA256"), files)]
    failed = record.failed_step
    if failed is not None and failed.tail:
        lines += ["", f"the last lines of {failed.name}:"]
        lines += [f"  {line}" for line in failed.tail.splitlines()[-15:]]
    if failed is not None and failed.remedy:
        lines += ["", ("what to do: ", failed.remedy)]
    lines += ["", *(f"note: {one_line(note)}" for note in record.notes), f"record: {record.page}"]
    return TaskResult(record.as_dict(), joined(lines, "\n"))


@contextmanager
def failed_build(paths: FarmPaths) -> Iterator[list[TaskResult]]:
    """A failed build is shown as its record too, not by its error alone."""
    from builds.record import find_record

    result: list[TaskResult] = []
    try:
        yield result
    except BuildFailed as error:
        if not error.build:
            raise
        shown = build_record(find_record(paths, error.build))
        data = {**shown.data, **error.as_dict()}
        result.append(
            TaskResult(data, shown.text, False, error.message, error.remedy, ending=error.ending)
        )


def step_log(record: BuildRecord, name: str) -> TaskResult:
    """The whole log of one step. UnknownName with the nearest known; NotFound: it left none."""
    from inventory.errors import NotFound, UnknownName

    known = {step.name: step for step in record.steps}
    if name not in known:
        raise UnknownName(
            f"build {record.id} has no step {name!r}",
            remedy=did_you_mean(name, known, f"it has {', '.join(known)}"),
        )
    step = known[name]
    path = record.directory / step.log
    if not step.log or not path.is_file():
        raise NotFound(
            f"build {record.id}: step {name} left no log: {step.status}",
            remedy=(Call("log"), " shows the build"),
        )
    from builds.log_text import log_lines

    text = path.read_bytes().decode(errors="replace")
    data = {"build": record.id, "step": name, "log": str(path), "text": text, "ours": step.ours}
    return TaskResult(data, "\n".join(log_lines(text, frozenset(step.ours))))


def rendered(files: Sequence[Rendered], out: str) -> TaskResult:
    """The files one after the other, or where they were written."""
    data = {
        "files": [
            {
                "service": file.document.service,
                "path": file.document.path,
                "own": file.document.own,
                "mode": f"{file.document.mode:04o}",
                "text": file.text,
            }
            for file in files
        ]
    }
    if out:
        return TaskResult(data, "\n".join(f"{out.rstrip('/')}{file.document.path}" for file in files))
    return TaskResult(data, "\n".join(f"==> {file.document.path} <==\n{file.text}" for file in files))


def applied(done: Outcome[ApplyResult], asked: VerifyReport | None) -> TaskResult:
    """What was done, or would be, how the files differ, and what the services then answered."""
    shown = outcome(done)
    parts: list[Text] = [done.result.diff, shown.text]
    if asked is None:
        return TaskResult(shown.data, joined(filter(None, parts), "\n"))
    answers = verified(asked)
    data = {**shown.data, **answers.data}
    text = joined(filter(None, (*parts, answers.text)), "\n")
    return TaskResult(data, text, answers.ok, answers.problem, answers.remedy)


def _about_answer(answer: Answer) -> str:
    return f"{answer.service}: {answer.vm}: {answer.text}"


def verified(report: VerifyReport) -> TaskResult:
    """What was asked, and each answer that is not the expected one."""
    if report.planned or not report.answers:
        return TaskResult(report.as_dict(), "\n".join(report.planned) or "there is nothing to ask")
    lines = [f"unknown  {_about_answer(answer)}; {answer.why}" for answer in report.unknown]
    lines += [
        f"wrong    {_about_answer(answer)}; expected {answer.expected}, seen {answer.seen}"
        if answer.vm
        else f"wrong    {answer.seen}"
        for answer in report.wrong
    ]
    right = len(report.answers) - len(lines)
    rest = f", {len(report.unknown)} can't be told" if report.unknown else ""
    lines.append(f"{right} of {len(report.answers)} answers are as expected{rest}")
    if report.ok:
        return TaskResult(report.as_dict(), "\n".join(lines))
    services = ", ".join(dict.fromkeys(answer.service for answer in report.wrong))
    return TaskResult(
        report.as_dict(),
        "\n".join(lines),
        False,
        f"{len(report.wrong)} wrong answers from {services}",
        (
            Call("network-apply", plan=True),
            " shows whether the files are right; else see the service's log",
        ),
    )
