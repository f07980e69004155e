"""The tasks: parse flags, make one call, print. What they do is in provision/ and builds/."""

from __future__ import annotations

from collections.abc import Sequence

from cli import options, streams, terminal, views
from cli.command import command
from cli.run import TaskResult, TaskRun
from host.program import ROOT
from inventory.errors import Call, Text, UsageError

# For those who type invoke, without the wrapper.
streams.take_over()

Names = Sequence[str] | None
_VM = "Name of a VM; repeatable, or separated by commas."
_ONE = "Name of the VM."
_ALL = "All VMs of the farm."
_WAIT = "Whether to wait until ssh answers as this very VM since this very start."


# ---- Before the first farm.


@command({"repair": "Set the modes of farmhand's own files right."}, plans=False)
def doctor(run: TaskRun, repair: bool = False) -> TaskResult:
    """Check this machine; each failure with its remedy."""
    from builds.checkup import with_source
    from provision.doctor import examine

    report = with_source(examine(run.farm_file(), repair=repair), run.farm_file(), ask=True)
    text = report.text(views.width(), run.words.text)
    return TaskResult(report.as_dict(), text, ok=report.ok)


@command({"destroy": "Take the demo farm away again: VMs, disks, records, state."})
def demo(run: TaskRun, destroy: bool = False) -> TaskResult:
    """Clone two VMs, build in them, and say what to type next."""
    from builds import demo as demonstration

    run.farm = str(demonstration.farm_file(run.farm))
    run.resume = ("go on with ", Call("demo"), ", or take it away with ", Call("demo", destroy=True))
    if destroy:
        return views.outcome(demonstration.destroy(run.site))
    if run.plan:
        return views.outcome(demonstration.plan(run.site))
    report = demonstration.run(run.site, stream=run.screen.stream)
    text = report.text(run.words.text)
    return TaskResult(report.as_dict(), text, report.ok, report.problem, report.remedy)


# ---- Templates.


@command({"name": "The template's name in the farm file; absent where there is only one."})
def template_build(run: TaskRun, name: str = "") -> TaskResult:
    """Build a new generation of a template."""
    from provision.operations.templates import TemplateBuild

    done = run.perform(lambda site: TemplateBuild(options.template(site, name, built=True)))
    return views.outcome(done)


@command(
    {
        "name": "The template's name in the farm file; absent where there is only one.",
        "image": "A raw, qcow2 or vmdk image; absent: the one the farm file names.",
    }
)
def template_import(run: TaskRun, name: str = "", image: str = "") -> TaskResult:
    """Import an image as a new generation of a template."""
    from pathlib import Path

    from provision.operations.templates import TemplateImport

    path = Path(image).expanduser().absolute() if image else None
    done = run.perform(lambda site: TemplateImport(options.template(site, name, built=False), path))
    return views.outcome(done)


@command(plans=False)
def template_list(run: TaskRun) -> TaskResult:
    """List the templates' generations."""
    from provision.operations.templates import template_list as found

    with run.site() as site:
        return views.templates(found(site))


@command({"template": "The generation, such as base@2."})
def template_remove(run: TaskRun, template: str = "") -> TaskResult:
    """Remove a generation that no clone depends on."""
    from provision.operations.templates import TemplateRemove

    label = options.needed("--template", template, "a generation, as template-list shows")
    return views.outcome(run.perform(lambda _: TemplateRemove(label)))


# ---- The farm.


@command(
    {
        "vm": _VM + " Absent: all of them.",
        "start": "Whether to start them.",
        "wait": _WAIT,
    },
    iterable=["vm"],
)
def clone_farm(run: TaskRun, vm: Names = None, start: bool = True, wait: bool = True) -> TaskResult:
    """Make every declared VM exist, started and reachable."""
    from provision.engine.runner import perform
    from provision.operations.clone import CloneFarm

    run.resume = "type the same again: it goes on from what is there"
    request = CloneFarm(options.names(vm), start, wait)
    with run.site() as site:
        done = perform(site, request)
        if run.plan:
            from builds.checkup import noted

            done = noted(site.farm, done)
        return views.outcome(done)


@command(
    {
        "vm": _VM,
        "all_": _ALL,
        "to": "The checkpoint to go back to.",
        "start": "Whether to start them afterwards.",
        "wait": _WAIT,
    },
    iterable=["vm"],
)
def reset(
    run: TaskRun,
    vm: Names = None,
    all_: bool = False,
    to: str = "clean",
    start: bool = True,
    wait: bool = True,
) -> TaskResult:
    """Put VMs back to a checkpoint, all of them or none."""
    from provision.operations.reset import Reset

    done = run.perform(lambda site: Reset(options.vms_or_all(site, vm, all_), to, start, wait))
    return views.outcome(done)


@command(
    {
        "vm": _ONE,
        "to": "The memory to give it, such as 512M or 2G.",
        "all_": "All VMs: idle ones down to idle_memory, then the others up, as far as their host may.",
        "plan_host": "Show who may have how much memory now, and who could give some; changes nothing.",
    }
)
def balloon(
    run: TaskRun, vm: str = "", to: str = "", all_: bool = False, plan_host: bool = False
) -> TaskResult:
    """Change running VMs' memory, and see that it took."""
    from provision.operations.balloon import Balloon, BalloonAll, memory_plan

    if (all_ or plan_host) and (vm or to or (all_ and plan_host)):
        words = "--all" if all_ else "--plan-host"
        raise UsageError(f"{words} is for the whole farm", remedy=f"{words} alone, or --vm and --to")
    run.plan = run.plan or plan_host  # a look, and nothing else
    if plan_host:
        with run.site() as site:
            return views.memory_plan(memory_plan(site))
    if all_:
        return views.outcome(run.perform(lambda _: BalloonAll()))
    target = options.size("--to", to)
    return views.outcome(run.perform(lambda site: Balloon(options.one_vm(site, vm), target)))


@command({"vm": _VM, "all_": _ALL, "wait": _WAIT}, iterable=["vm"])
def start(run: TaskRun, vm: Names = None, all_: bool = False, wait: bool = True) -> TaskResult:
    """Start VMs, and wait until they answer."""
    from provision.power import Start

    return views.outcome(run.perform(lambda site: Start(options.vms_or_all(site, vm, all_), wait)))


@command(
    {"vm": _VM, "all_": _ALL, "force": "Cut the power, without asking the guest to shut down."},
    iterable=["vm"],
)
def stop(run: TaskRun, vm: Names = None, all_: bool = False, force: bool = False) -> TaskResult:
    """Shut VMs down."""
    from provision.power import Stop

    return views.outcome(run.perform(lambda site: Stop(options.vms_or_all(site, vm, all_), force)))


@command(
    {
        "vm": _VM,
        "all_": _ALL,
        "name": "The new checkpoint's name.",
        "warm": "Of one running VM, which runs on: its memory too (driver xenapi).",
        "merge": "No new one: write the disk's changes into the one it grew from (store lvm, linked).",
    },
    iterable=["vm"],
)
def checkpoint(
    run: TaskRun,
    vm: Names = None,
    all_: bool = False,
    name: str = "",
    warm: bool = False,
    merge: bool = False,
) -> TaskResult:
    """Keep VMs' state, for reset to go back to."""
    from provision.operations.checkpoint import TakeCheckpoint
    from provision.operations.merge import Merge

    if merge and name:
        raise UsageError("--merge makes no new checkpoint", remedy="give --name or --merge")
    if warm and (merge or all_):
        raise UsageError(
            f"--warm is for one VM's new checkpoint, not with {'--merge' if merge else '--all'}",
            remedy="--vm NAME --name NAME --warm",
        )
    if merge:
        return views.outcome(run.perform(lambda site: Merge(options.vms_or_all(site, vm, all_))))
    label = options.needed("--name", name, "the new checkpoint's name")
    done = run.perform(lambda site: TakeCheckpoint(label, options.vms_or_all(site, vm, all_), warm))
    return views.outcome(done)


@command(
    {
        "vm": _VM,
        "all_": "The whole farm: VMs, templates, private daemon, state.",
        "purge": "With --all: the build records too.",
        "yes": "With --all: don't ask first, as on a terminal it does.",
    },
    iterable=["vm"],
)
def destroy(
    run: TaskRun, vm: Names = None, all_: bool = False, purge: bool = False, yes: bool = False
) -> TaskResult:
    """Remove VMs and their disks."""
    from provision.operations.destroy import Destroy

    if all_ and not vm and not yes:
        terminal.agree(run, lambda: _doomed(run, purge))
    # Not only declared ones: a VM taken out of the farm file can be named too. None: the whole farm.
    done = run.perform(lambda site: Destroy(options.some_or_all(site, vm, all_) or (), purge))
    return views.outcome(done)


def _doomed(run: TaskRun, purge: bool) -> tuple[object, Text]:
    from provision.engine.runner import perform
    from provision.operations.destroy import Destroy
    from provision.status import status as look

    with run.site(plan=True) as site:
        return views.doomed(perform(site, Destroy(purge=purge)), look(site))


@command()
def gc(run: TaskRun) -> TaskResult:
    """Remove what nothing refers to any more."""
    from provision.operations.gc import Gc

    return views.outcome(run.perform(lambda _: Gc()), nothing="nothing left over")


@command()
def recover(run: TaskRun) -> TaskResult:
    """Finish or undo what a killed command left behind."""
    from provision.operations.recover import Recover

    return views.outcome(run.perform(lambda _: Recover()), nothing="nothing to recover")


# ---- Looking, and going in.


@command(plans=False)
def status(run: TaskRun) -> TaskResult:
    """Show the VMs as they are now."""
    from provision.status import status as look  # not all of provision.farm: this one is to be quick

    with run.site() as site:
        return views.farm_status(look(site))


@command({"vm": _ONE, "log": "Print the end of the console's log instead of attaching.",
          "lines": "How many lines of the log."})  # fmt: skip
def console(run: TaskRun, vm: str = "", log: bool = False, lines: str = "40") -> TaskResult | None:
    """Attach to a VM's serial console."""
    most = options.count("--lines", lines)
    with run.site() as site:
        role = options.one_vm(site, vm)
        member = site.member(role)
        found = member.driver.console(member.machine)
    return terminal.console(run, role, found, log=log, lines=most)


@command({"vm": _ONE, "command": "A shell command to run there instead of a login shell."})
def ssh(run: TaskRun, vm: str = "", command: str = "") -> TaskResult | None:
    """Log in to a VM, or run a command there."""
    with run.site() as site:
        member = site.member(options.one_vm(site, vm))
        argv = member.ssh_argv(member.endpoint(), command)
    return terminal.ssh(run, argv)


# ---- Network services.

_SERVICE = "A service the farm uses; repeatable. Absent: all of them."


@command(
    {"service": _SERVICE, "out": "Write the files below this directory instead."},
    iterable=["service"],
    plans=False,
)
def render(run: TaskRun, service: Names = None, out: str = "") -> TaskResult:
    """Show the network services' files as they should be."""
    from pathlib import Path

    from provision.network.rendered import rendered, write_out

    with run.site() as site:
        files = rendered(site, tuple(service or ()))
        if out:
            write_out(files, Path(out).expanduser())
        return views.rendered(files, out)


@command(
    {
        "service": _SERVICE,
        "force": "Write anew what is farmhand's also where somebody edited it.",
        "verify": "Whether to ask the services afterwards, as network-verify does.",
    },
    iterable=["service"],
)
def network_apply(
    run: TaskRun, service: Names = None, force: bool = False, verify: bool = True
) -> TaskResult:
    """Bring the network services in step, all of them or none."""
    from provision.engine.runner import perform
    from provision.network.apply import NetworkApply
    from provision.network.verify import network_verify

    names = tuple(service or ())
    with run.site() as site:
        done = perform(site, NetworkApply(names, force))
        asked = network_verify(site, names) if verify and not run.plan else None
        return views.applied(done, asked)


@command({"service": _SERVICE, "vm": _VM + " Absent: all of them."}, iterable=["service", "vm"])
def network_verify(run: TaskRun, service: Names = None, vm: Names = None) -> TaskResult:
    """Ask the live services as their clients do."""
    from provision.network.verify import network_verify as verify

    with run.site() as site:
        return views.verified(verify(site, tuple(service or ()), options.names(vm)))


@command(
    {
        "zone": "A zone file to read, such as /etc/bind/db.farm.",
        "origin": "The zone's name; absent: what follows db. in the file's name.",
        "dhcpd": "A dhcpd.conf to read.",
        "name": "The new farm's name.",
        "out": "Write the farm file there, if there is none.",
    },
    plans=False,
)
def network_import(
    _run: TaskRun, zone: str = "", origin: str = "", dhcpd: str = "", name: str = "farm", out: str = ""
) -> TaskResult:
    """Make a farm file from a zone and a dhcpd.conf."""
    from pathlib import Path

    from provision.network.importing import network_import as read

    first, second = (
        Path(options.needed(f"--{key}", given, "a file to read")).expanduser()
        for key, given in (("zone", zone), ("dhcpd", dhcpd))
    )
    to = Path(out).expanduser() if out else None
    found = read(first, second, origin=origin, name=name, out=to)
    return TaskResult(found.as_dict(), f"{out} written" if out else found.text)


# ---- Building.


@command(
    {
        "from_": "Begin with this step.",
        "only": "Run only this step; repeatable.",
        "revision": "The git revision to build: GIT_REVISION in the VM.",
        "keep_going": "Go on after a failed step with those that can still run.",
    },
    iterable=["only"],
)
def cycle(
    run: TaskRun,
    from_: str | None = None,
    only: Names = None,
    revision: str | None = None,
    keep_going: bool = False,
) -> TaskResult:
    """Run the build cycle; it leaves one build record."""
    from builds.operation import RunCycle
    from builds.record import find_record
    from builds.resume import cycle_asked, from_step
    from provision.engine.runner import perform

    which = options.names(only, "--only", "a step of the cycle")
    asked = cycle_asked(only=which, revision=revision, keep_going=keep_going)
    run.resume = (
        "what is done is kept; ",
        Call("log"),
        " shows the step it stopped in; go on with: ",
        from_step(asked, "STEP"),
    )
    request = RunCycle(
        start_from=from_, only=tuple(which), revision=revision, keep_going=keep_going,
        stream=run.screen.stream,
    )  # fmt: skip
    with run.site() as site:
        if run.plan:
            return views.outcome(perform(site, request))
        with views.failed_build(site.paths) as result:
            build = perform(site, request).result.build
            result.append(views.build_record(find_record(site.paths, build)))
        return result[0]


@command(
    {"build": "The build's id; absent: the last one.", "step": "Print this step's log."}, plans=False
)
def log(run: TaskRun, build: str = "last", step: str = "") -> TaskResult:
    """Show a build's record, or a step's log."""
    from builds.record import find_record

    with run.site() as site:
        record = find_record(site.paths, build or "last")
        if step:
            return views.step_log(record, step)
        return views.build_record(record)


@command({"limit": "How many."}, plans=False)
def history(run: TaskRun, limit: str = "20") -> TaskResult:
    """Show what was done, and what was built, newest first."""
    from builds.record import foreign_records, load_records

    with run.site() as site:
        most = options.count("--limit", limit)
        return views.history(
            site.journal.history(most), load_records(site.paths), most, foreign_records(site.paths)
        )


# ---- farmhand's own development, where its tests are.

if (ROOT / "tests").is_dir():
    from tests.dev.tasks import bench, lab_down, lab_ssh, lab_test, lab_up, lint, test  # noqa: F401
