"""Files carried out: a build's artifacts, and what is copied in and out of VMs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cli import options, views
from cli.command import command
from cli.options import FlagValues
from cli.run import TaskResult, TaskRun
from inventory.errors import Call, UsageError
from inventory.sizes import rounded

if TYPE_CHECKING:
    from provision.guest.copying import CopiedTree
    from provision.site import Site


@command(
    {
        "build": options.BUILD,
        "to": "Copy them into this directory, which is made if it is missing. Absent: list them.",
    },
    plans=True,
    bare="build",
)
def artifacts(run: TaskRun, build: str = "", to: str = "") -> TaskResult:
    """List what a build made, or copy it to a directory."""
    from builds.artifacts import copies_wanted, copy_artifacts, made_by

    with run.site() as site:
        made = made_by(site.paths, build or "last", package=options.is_package_build(site, build))
        data = {"build": made.build, "result": made.result, "files": made.files_as_data()}
        if not to:
            rows = [(file.name, rounded(file.size), file.sha256, file.path) for file in made.files]
            table = views.table(("FILE", "SIZE", "SHA256", f"IN {made.directory}"), rows)
            return TaskResult(
                data, table if rows else f"build {made.build} ({made.result}) made no files"
            )
        target = Path(to).expanduser().absolute()
        done = copies_wanted(made, target) if run.plan else copy_artifacts(made, target)
    lines = [
        *(f"{'would copy' if run.plan else 'copied'}: {target / name}" for name in done.copied),
        *(f"there already: {target / name}" for name in done.same),
        f"{len(made.files)} file{'s' * (len(made.files) != 1)} of build {made.build} ({made.result})",
    ]
    return TaskResult(
        {**data, "to": str(target), "copied": list(done.copied), "same": list(done.same)},
        "\n".join(lines),
    )


@command(
    {
        "path": "Given twice: what to copy, a file or a directory here, or VM:PATH; then where to, a "
        "directory or a new name here, or VM:PATH.",
    },
    iterable=["path"],
    does=("cp",),
    bare="path",
    shown="FROM TO",
)
def cp(run: TaskRun, path: FlagValues = None) -> TaskResult:
    """Copy files or directories into a VM, or out of one."""
    words = tuple(path or ())
    if len(words) != 2:
        raise UsageError(
            "what is to be copied, and where to?", remedy="two paths, one of them VM:PATH: build:/path ."
        )
    source, target = words
    first, second = _in_vm(source), _in_vm(target)
    if (first is None) == (second is None):
        raise UsageError(
            "one of both is in a VM, and the other one here"
            if first
            else f"neither {source} nor {target} is in a VM",
            remedy="VM:PATH and DIRECTORY, or FILE and VM:PATH; a file here with ':' in it is ./FILE",
        )
    if second is not None:
        vm, there = second
        with run.site() as site:
            done = run.perform(site, "cp", vm=vm, source=Path(source).expanduser(), target=there)
        copied = done.result.copied
        return views.outcome(done) if copied is None else _view(vm, f"{vm}:{copied.path}", copied)
    assert first is not None
    vm, there = first
    run.does = ()  # to copy out of a VM changes nothing there
    with run.site() as site:
        (vm,) = site.vms([vm])
        if run.plan:
            return TaskResult(
                {"vm": vm, "from": source, "to": target}, f"would copy {source} to {target}"
            )
        copied = _copied_out(site, vm, there, Path(target).expanduser())
    return _view(vm, copied.path, copied)


def _in_vm(text: str) -> tuple[str, str] | None:
    """The VM, and the path there; None: it is a path here."""
    vm, colon, path = text.partition(":")
    return (vm, path) if colon and vm and "/" not in vm else None


def _copied_out(site: Site, vm: str, there: str, here: Path) -> CopiedTree:
    import asyncio
    from functools import partial

    from provision.guest.copying import copy_out
    from provision.member import Member
    from provision.operations.copy_in import reached, told

    async def copied() -> CopiedTree:
        member = Member(site, vm)
        async with reached(member) as connection:
            return await copy_out(connection, there, here, partial(told, member))

    return asyncio.run(copied())


def _view(vm: str, where: str, done: CopiedTree) -> TaskResult:
    from provision.guest.copying import left_out_in_words

    count = f"{done.entries} entries, " if done.entries != 1 else ""
    data = {
        "vm": vm, "path": done.path, "entries": done.entries, "bytes": done.bytes,
        "left_out": list(done.left_out), "left_out_count": done.left_out_count,
    }  # fmt: skip
    text = f"{where} ({count}{rounded(done.bytes)})"
    if not done.left_out_count:
        return TaskResult(data, text)
    problem = f"not all of it was copied: {left_out_in_words(done)}"
    remedy = ("what a link leads to can be copied by its own path; look: ", Call("ssh", vm=vm))
    return TaskResult(data, text, ok=False, problem=problem, remedy=remedy)
