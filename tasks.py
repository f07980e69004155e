"""The tasks: parse flags, make one call, print. What they do is in provision/ and builds/."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from invoke.tasks import Task

from cli import options, streams, terminal, views
from cli.command import command
from cli.options import FlagValues
from cli.run import TaskResult, TaskRun
from host.program import ROOT
from inventory.endings import BUILD, ENVIRONMENT
from inventory.errors import Call, Text, UsageError

# For those who type invoke, without the wrapper.
streams.take_over()

_VM = "Name of a VM; repeatable, or separated by commas."
_ONE = "Name of the VM."
_ALL = "All VMs of the farm."
_NO_WAIT = "Don't wait until ssh answers as this very VM since this very start."


# ---- Before the first farm.


@command({"repair": "Set the modes of farmhand's own files right."})
def doctor(run: TaskRun, repair: bool = False) -> TaskResult:
    """Check this machine; each failure with its remedy."""
    from builds.checkup import with_source
    from provision.doctor import examine

    report = with_source(examine(run.farm_file(), repair=repair), run.farm_file(), ask=True)
    text = report.text(views.width(), run.words.text)
    return TaskResult(report.as_dict(), text, ok=report.ok, ending=ENVIRONMENT)


@command(
    {"destroy": "Take the demo farm away again: VMs, disks, records, state."},
    does=("clone-farm", "cycle", "destroy"),
)
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
    problem, remedy = report.problem, report.remedy
    return TaskResult(report.as_dict(), text, report.ok, problem, remedy, ending=BUILD)


# ---- Templates.


@command(
    {
        "name": "The template's name in the farm file; absent where there is only one.",
        "fresh": "Of today's packages, also where a disk of this recipe is in the cache.",
    },
    does=("template-build",),
    bare="name",
)
def template_build(run: TaskRun, name: str = "", fresh: bool = False) -> TaskResult:
    """Build a new generation of a template."""
    with run.site() as site:
        name = options.template(site, name, built=True)
        return views.outcome(run.perform(site, "template-build", template=name, fresh=fresh))


@command(
    {
        "name": "The template's name in the farm file; absent where there is only one.",
        "image": "A raw, qcow2, vmdk, VDI, VHD or VHDX image; absent: the one the farm file names.",
    },
    does=("template-import",),
    bare="name",
)
def template_import(run: TaskRun, name: str = "", image: str = "") -> TaskResult:
    """Import an image as a new generation of a template."""
    from pathlib import Path

    path = Path(image).expanduser().absolute() if image else None
    with run.site() as site:
        name = options.template(site, name, built=False)
        return views.outcome(run.perform(site, "template-import", template=name, image=path))


@command()
def template_list(run: TaskRun) -> TaskResult:
    """List the templates' generations."""
    from provision.operations.templates import template_list as found

    with run.site() as site:
        return views.templates(found(site), site.identity)


@command({"template": "The generation, such as base@2."}, does=("template-remove",), bare="template")
def template_remove(run: TaskRun, template: str = "") -> TaskResult:
    """Remove a generation that no clone depends on."""
    label = options.needed("--template", template, "a generation, as template-list shows")
    with run.site() as site:
        return views.outcome(run.perform(site, "template-remove", label=label))


# ---- The farm.


@command(
    {
        "vm": _VM + " Absent: all of them.",
        "start": "Whether to start them.",
        "no_wait": _NO_WAIT,
    },
    iterable=["vm"],
    does=("clone-farm",),
)
def clone_farm(
    run: TaskRun, vm: FlagValues = None, start: bool = True, no_wait: bool = False
) -> TaskResult:
    """Make every declared VM exist, started and reachable."""
    run.resume = "type the same again: it goes on from what is there"
    vms = options.names(vm)
    with run.site() as site:
        done = run.perform(site, "clone-farm", vms=vms, start=start, wait=not no_wait)
        if run.plan:
            from builds.checkup import noted

            done = noted(site.farm, done)
        return views.outcome(done)


@command(
    {
        "vm": _VM,
        "all_": _ALL,
        "to": "The checkpoint to go back to; absent: each VM's 'reset_to', or clean.",
        "start": "Whether to start them afterwards.",
        "no_wait": _NO_WAIT,
        "cold": "Boot them, also from a checkpoint that has their memory.",
    },
    iterable=["vm"],
    does=("reset",),
)
def reset(
    run: TaskRun,
    vm: FlagValues = None,
    all_: bool = False,
    to: str = "",
    start: bool = True,
    no_wait: bool = False,
    cold: bool = False,
) -> TaskResult:
    """Put VMs back to a checkpoint, all of them or none."""
    with run.site() as site:
        vms = options.vms_or_all(site, vm, all_)
        return views.outcome(
            run.perform(site, "reset", vms=vms, to=to, start=start, wait=not no_wait, cold=cold)
        )


@command(
    {
        "vm": _ONE,
        "to": "The memory to give it, such as 512M or 2G.",
        "all_": "All VMs: idle ones down to idle_memory, then the others up, as far as their host may.",
        "plan_host": "Show who may have how much memory now, and who could give some; changes nothing.",
    },
    does=("balloon", "balloon-all"),
)
def balloon(
    run: TaskRun, vm: str = "", to: str = "", all_: bool = False, plan_host: bool = False
) -> TaskResult:
    """Change running VMs' memory, and see that it took."""
    if (all_ or plan_host) and (vm or to or (all_ and plan_host)):
        words = "--all" if all_ else "--plan-host"
        raise UsageError(f"{words} is for the whole farm", remedy=f"{words} alone, or --vm and --to")
    run.plan = run.plan or plan_host  # a look, and nothing else
    if plan_host:
        from provision.operations.balloon import memory_plan

        with run.site() as site:
            return views.memory_plan(memory_plan(site))
    target = 0 if all_ else options.size("--to", to)
    with run.site() as site:
        if all_:
            return views.outcome(run.perform(site, "balloon-all"))
        vm = options.one_vm(site, vm)
        return views.outcome(run.perform(site, "balloon", vm=vm, target=target))


@command(
    {
        "vm": _VM,
        "all_": _ALL,
        "autostart": "Those with 'autostart' in the farm file.",
        "no_wait": _NO_WAIT,
        "cold": "Boot them, also where their memory is kept.",
    },
    iterable=["vm"],
    does=("start",),
)
def start(
    run: TaskRun,
    vm: FlagValues = None,
    all_: bool = False,
    autostart: bool = False,
    no_wait: bool = False,
    cold: bool = False,
) -> TaskResult:
    """Start VMs, and wait until they answer."""
    if autostart and (vm or all_):
        raise UsageError("--autostart chooses the VMs", remedy="give it without --vm and --all")
    with run.site() as site:
        if autostart:
            vms = tuple(name for name, declared in site.farm.vms.items() if declared.autostart)
            if not vms:
                return TaskResult({"vms": []}, "no VM has 'autostart: yes' in the farm file")
        else:
            vms = options.vms_or_all(site, vm, all_)
        return views.outcome(run.perform(site, "start", vms=vms, wait=not no_wait, cold=cold))


@command(
    {
        "install": "Write the unit and enable it, instead of showing it.",
        "remove": "Disable and remove it.",
    },
    does=("boot-unit-install", "boot-unit-remove"),
)
def boot_unit(run: TaskRun, install: bool = False, remove: bool = False) -> TaskResult:
    """Show or install a systemd unit that starts VMs at boot."""
    from provision.boot_unit import boot_unit as unit_of

    if install and remove:
        raise UsageError("--install and --remove together: which is meant?", remedy="give one of them")
    with run.site() as site:
        if install:
            return views.outcome(run.perform(site, "boot-unit-install"))
        if remove:
            return views.outcome(run.perform(site, "boot-unit-remove"))
        made = unit_of(site.farm)
        return TaskResult({"file": str(made.file), "unit": made.text}, made.text.rstrip())


@command(
    {"vm": _VM, "all_": _ALL, "force": "Cut the power, without asking the guest to shut down."},
    iterable=["vm"],
    does=("stop",),
)
def stop(run: TaskRun, vm: FlagValues = None, all_: bool = False, force: bool = False) -> TaskResult:
    """Shut VMs down."""
    with run.site() as site:
        vms = options.vms_or_all(site, vm, all_)
        return views.outcome(run.perform(site, "stop", vms=vms, force=force))


@command(
    {
        "vm": _VM,
        "all_": _ALL,
        "name": "The new checkpoint's name.",
        "warm": "Of running VMs, which run on: their memory too. On xenapi one VM at a time.",
        "merge": "No new one: write the disk's changes into the one it grew from (store lvm, linked).",
    },
    iterable=["vm"],
    does=("checkpoint", "merge"),
)
def checkpoint(
    run: TaskRun,
    vm: FlagValues = None,
    all_: bool = False,
    name: str = "",
    warm: bool = False,
    merge: bool = False,
) -> TaskResult:
    """Keep VMs' state, for reset to go back to."""
    if merge and name:
        raise UsageError("--merge makes no new checkpoint", remedy="give --name or --merge")
    if warm and merge:
        raise UsageError(
            "--warm is for a new checkpoint, not with --merge", remedy="--vm NAME --name NAME --warm"
        )
    label = "" if merge else options.needed("--name", name, "the new checkpoint's name")
    with run.site() as site:
        vms = options.vms_or_all(site, vm, all_)
        if merge:
            return views.outcome(run.perform(site, "merge", vms=vms))
        return views.outcome(run.perform(site, "checkpoint", label=label, vms=vms, warm=warm))


@command({"vm": _VM + " Absent: all of them."}, iterable=["vm"])
def checkpoint_list(run: TaskRun, vm: FlagValues = None) -> TaskResult:
    """List VMs' checkpoints."""
    from provision.operations.checkpoint_remove import kept_states

    with run.site() as site:
        return views.checkpoints(kept_states(site, options.names(vm)))


@command(
    {"vm": _VM, "all_": _ALL, "name": "The checkpoint's name."},
    iterable=["vm"],
    does=("checkpoint-remove",),
)
def checkpoint_remove(
    run: TaskRun, vm: FlagValues = None, all_: bool = False, name: str = ""
) -> TaskResult:
    """Remove a checkpoint that no disk grows from."""
    label = options.needed("--name", name, "a checkpoint, as checkpoint-list shows")
    with run.site() as site:
        vms = options.vms_or_all(site, vm, all_)
        return views.outcome(run.perform(site, "checkpoint-remove", label=label, vms=vms))


@command(
    {"vm": "Its name in the farm file by now.", "was": "The name that it was made under."},
    does=("rename",),
)
def rename(run: TaskRun, vm: str = "", was: str = "") -> TaskResult:
    """Give a made VM its new name of the farm file."""
    new = options.needed("--vm", vm, "the VM's name in the farm file")
    old = options.needed("--was", was, "the name that it was made under, as status shows")
    with run.site() as site:
        return views.outcome(run.perform(site, "rename", vm=new, was=old))


@command(
    {
        "vm": _VM,
        "all_": _ALL,
        "packages": "Packages to install, separated by commas, by the guest's apt-get, dnf or yum.",
        "script": "A file: a script that is run there as root, after that.",
        "from_template": "With nothing added: the template's own clean again.",
    },
    iterable=["vm"],
    does=("clean",),
)
def clean(
    run: TaskRun,
    vm: FlagValues = None,
    all_: bool = False,
    packages: str = "",
    script: str = "",
    from_template: bool = False,
) -> TaskResult:
    """Remake VMs' checkpoint clean: the template's, with tools."""
    if bool(packages or script) == from_template:
        raise UsageError(
            "clean is remade with packages, a script, or both, or with --from-template",
            remedy="--packages NAME,NAME, --script FILE, or --from-template alone",
        )
    from pathlib import Path

    from builds.clean import read_script

    named = options.names([packages], "--packages", "a package") if packages else ()
    text = read_script(Path(script)) if script else ""
    with run.site() as site:
        vms = options.vms_or_all(site, vm, all_)
        request = {"packages": named, "script": text, "script_name": script}
        return views.outcome(run.perform(site, "clean", vms=vms, **request))


@command({"vm": _VM, "all_": _ALL}, iterable=["vm"], does=("renew",))
def renew(run: TaskRun, vm: FlagValues = None, all_: bool = False) -> TaskResult:
    """Move VMs to their template's newest generation."""
    with run.site() as site:
        vms = options.vms_or_all(site, vm, all_)
        return views.outcome(run.perform(site, "renew", vms=vms))


@command(
    {
        "vm": _VM,
        "all_": "The whole farm: VMs, templates, private daemon, state.",
        "purge": "With --all: the build records too.",
        "yes": "With --all: don't ask first, as on a terminal it does.",
    },
    iterable=["vm"],
    does=("destroy",),
)
def destroy(
    run: TaskRun, vm: FlagValues = None, all_: bool = False, purge: bool = False, yes: bool = False
) -> TaskResult:
    """Remove VMs and their disks."""
    if all_ and not vm and not yes:
        terminal.agree(run, lambda: _doomed(run, purge))
    with run.site() as site:
        # Not only declared ones: a VM taken out of the farm file can be named too. None: the whole farm.
        vms = options.some_or_all(site, vm, all_) or ()
        return views.outcome(run.perform(site, "destroy", vms=vms, purge=purge))


def _doomed(run: TaskRun, purge: bool) -> tuple[object, Text]:
    from provision.status import status as look

    with run.site(plan=True) as site:
        return views.doomed(run.perform(site, "destroy", purge=purge), look(site))


@command(
    {"caches": "And all in the cache directory that nothing uses now: it is made again."}, does=("gc",)
)
def gc(run: TaskRun, caches: bool = False) -> TaskResult:
    """Remove what nothing refers to any more."""
    with run.site() as site:
        return views.outcome(run.perform(site, "gc", caches=caches), nothing="nothing left over")


@command(
    {
        "vm": "A VM of the other farm; repeatable. Absent: all that it has here, templates too.",
        "of": "The beginning of the other farm's number, where there are several.",
    },
    does=("adopt",),
    iterable=["vm"],
)
def adopt(run: TaskRun, vm: FlagValues = None, of: str = "") -> TaskResult:
    """Take over VMs and templates of another farm of this name."""
    with run.site(adopting=True) as site:
        return views.outcome(run.perform(site, "adopt", vms=tuple(vm or ()), of=of))


@command(does=("recover",))
def recover(run: TaskRun) -> TaskResult:
    """Finish or undo what a killed command left behind."""
    with run.site() as site:
        return views.outcome(run.perform(site, "recover"), nothing="nothing to recover")


@command(
    {
        "remote": "The lock that the cycle shares with other machines ('lock' in the farm file).",
        "force": "End it, whoever holds it: if that is dead for sure.",
    },
    does=("unlock",),
)
def unlock(run: TaskRun, remote: bool = False, force: bool = False) -> TaskResult:
    """Show who holds the lock shared with others, or break it."""
    if not remote:
        raise UsageError(
            "locks on this machine end with who holds them: there is none to break",
            remedy="--remote is for the lock that the cycle shares with other machines",
        )
    with run.site() as site:
        return views.outcome(run.perform(site, "unlock", force=force))


# ---- Looking, and going in.


@command()
def status(run: TaskRun) -> TaskResult:
    """Show the VMs as they are now."""
    from provision.status import status as look  # late: this one is to be quick

    with run.site() as site:
        return views.farm_status(look(site, ask=True))


@command({"vm": _ONE, "log": "Print the end of the console's log instead of attaching.",
          "lines": "How many lines of the log."}, plans=True)  # fmt: skip
def console(run: TaskRun, vm: str = "", log: bool = False, lines: str = "40") -> TaskResult | None:
    """Attach to a VM's serial console."""
    most = options.count("--lines", lines)
    with run.site() as site:
        role = options.one_vm(site, vm)
        from provision.member import Member

        member = Member(site, role)
        found = member.driver.console(member.machine)
    return terminal.console(run, role, found, log=log, lines=most)


@command(
    {"vm": _ONE, "command": "A shell command to run there instead of a login shell; or all after --."},
    rest="command",
    plans=True,
)
def ssh(run: TaskRun, vm: str = "", command: str = "") -> TaskResult | None:
    """Log in to a VM, or run a command there."""
    with run.site() as site:
        from provision.member import Member

        member = Member(site, options.one_vm(site, vm))
        argv = member.ssh_argv(member.endpoint(), command)
        if not (run.plan or run.json):
            from provision.power import bring_to_present, require_answer

            require_answer(member)
            bring_to_present(member)
    return terminal.ssh(run, argv)


# ---- Network services.

_SERVICE = "A service the farm uses; repeatable. Absent: all of them."


@command(
    {"service": _SERVICE, "out": "Write the files below this directory instead."},
    iterable=["service"],
)
def render(run: TaskRun, service: FlagValues = None, out: str = "") -> TaskResult:
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
        "force": "Write anew what is farmhand's also where somebody edited it, or its state is lost.",
        "take-aside": "Keep your files that are in the way as FILE.before-farmhand; destroy puts them "
        "back.",
        "verify": "Whether to ask the services afterwards, as network-verify does.",
    },
    iterable=["service"],
    does=("network-apply",),
)
def network_apply(
    run: TaskRun,
    service: FlagValues = None,
    force: bool = False,
    take_aside: bool = False,
    verify: bool = True,
) -> TaskResult:
    """Bring the network services in step, all of them or none."""
    from provision.network.verify import network_verify

    names = tuple(service or ())
    with run.site() as site:
        done = run.perform(site, "network-apply", services=names, force=force, take_aside=take_aside)
        asked = network_verify(site, names) if verify and not run.plan else None
        return views.applied(done, asked)


@command(
    {"service": _SERVICE, "vm": _VM + " Absent: all of them."}, iterable=["service", "vm"], plans=True
)
def network_verify(run: TaskRun, service: FlagValues = None, vm: FlagValues = None) -> TaskResult:
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
    }
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
    more = f"; its comments name what it doesn't say ({len(found.left)})" if found.left else ""
    return TaskResult(found.as_dict(), f"{out} written{more}" if out else found.text)


# ---- Building.


@command(
    {
        "from_": "Begin with this step.",
        "only": "Run only this step; repeatable.",
        "revision": "The git revision to build: GIT_REVISION in the VM.",
        "like": "Give it the package repositories, and the revision, that this build had, by its id.",
        "keep_going": "Go on after a failed step with those that can still run.",
        "debug": "Stop where a step fails: a shell there on a terminal; else the command that opens it.",
        "explain": "Show what each step does, with its whole scripts and what they get; no VM is asked.",
    },
    iterable=["only"],
    does=("cycle",),
)
def cycle(
    run: TaskRun,
    from_: str | None = None,
    only: FlagValues = None,
    revision: str | None = None,
    like: str = "",
    keep_going: bool = False,
    debug: bool = False,
    explain: bool = False,
) -> TaskResult:
    """Run the build cycle; it leaves one build record."""
    from builds.record import find_record
    from builds.resume import cycle_asked, from_step

    if explain:
        from cli.cycle_views import explained

        with run.site(plan=True) as site:
            return explained(site)
    which = options.names(only, "--only", "a step of the cycle")
    asked = cycle_asked(only=which, revision=revision, like=like, keep_going=keep_going)
    run.resume = (
        "what is done is kept; ",
        Call("log"),
        " shows the step it stopped in; go on with: ",
        from_step(asked, "STEP"),
    )
    with run.site() as site, views.failed_build(site.paths) as result:
        done = run.perform(
            site, "cycle", start_from=from_, only=which, revision=revision, like=like,
            keep_going=keep_going, stream=run.screen.stream,
            debugger=terminal.debugger(run) if debug else None,
        )  # fmt: skip
        if run.plan:
            return views.outcome(done)
        result.append(views.build_record(find_record(site.paths, done.result.build)))
    return result[0]


@command(
    {
        "build": options.BUILD,
        "step": "Print this step's log; of a package's build: 'build'.",
        "follow": "Print the logs of all steps as they are written, until the running build ends.",
    },
    bare="build",
)
def log(run: TaskRun, build: str = "", step: str = "", follow: bool = False) -> TaskResult:
    """Show a build's record, or a step's log."""
    from builds.record import find_record

    if follow and step:
        raise UsageError("--follow is of all steps", remedy="--follow, or --step NAME")
    with run.site() as site:
        if follow:
            from cli.following import follow_build

            return views.build_record(follow_build(run, site, build))
        if options.is_package_build(site, build):
            from cli import package_views

            return package_views.log(site, build, step)
        record = find_record(site.paths, build or "last")
        if step:
            return views.step_log(record, step)
        return views.build_record(record)


@command(
    {
        "limit": "How many.",
        "since": 'From then on: "2 days", yesterday, 2026-11-20, 2026-11-20T18:00.',
        "revision": "Only builds of this commit (its beginning), branch, tag or version.",
        "vm": "Only what this VM was used in.",
        "failed": "Only what did not end well.",
    }
)
def history(
    run: TaskRun, limit: str = "20", since: str = "", revision: str = "", vm: str = "",
    failed: bool = False,
) -> TaskResult:  # fmt: skip
    """Show what was done, and what was built, newest first."""
    from builds.record import all_records
    from builds.sought import SoughtBuilds

    most = options.count("--limit", limit)
    begun = options.since("--since", since) if since else None
    sought = SoughtBuilds(since=begun, revision=revision, vm=vm, failed=failed)
    with run.site() as site:
        done = () if revision else site.journal.history(most, vm=vm, since=begun, failed=failed)
        builds, unreadable = all_records(site.paths)
        builds = tuple(filter(sought.has, builds))
        if vm and not done and not builds:
            site.vms([vm])  # or it is a name that nothing has
        return views.history(done, builds, most, unreadable if sought.all else {}, sought=not sought.all)


# ---- Packages, their repositories, and farm files: rooms of their own. A command that is none of theirs
# doesn't pay for them.

_OF_ROOMS = ("farm-", "flow-", "repo-")
_OF_PACKAGES = {"build", "graph", "new", "packages", "pages", "rebuild", "why", "why-not"}
_OF_FILES = {"artifacts", "cp", "farms"}


def _may_be_asked_for(words: Sequence[str]) -> bool:
    """Whether the words may be about those tasks: they begin so, they ask for all tasks, or none of the
    tasks above is among them, as where a name is misspelt. Whoever else imports this file gets all."""
    if sys.argv[0].endswith("__main__.py") or {"--list", "-l", "--help", "-h", "--complete"} & {*words}:
        return True
    above = {task.name.replace("_", "-") for task in globals().values() if isinstance(task, Task)}
    return not above & {*words} or any(
        word in _OF_PACKAGES | _OF_FILES or word.startswith(_OF_ROOMS) for word in words
    )


if _may_be_asked_for(sys.argv[1:]):
    from cli.build_tasks import build  # noqa: F401
    from cli.farm_tasks import farm_diff, farm_twin, farms  # noqa: F401
    from cli.file_tasks import artifacts, cp  # noqa: F401
    from cli.flow_tasks import (  # noqa: F401
        flow_begin,
        flow_bisect,
        flow_fail,
        flow_list,
        flow_pass,
        flow_show,
    )
    from cli.new_tasks import new  # noqa: F401
    from cli.package_tasks import graph, packages, rebuild, why, why_not  # noqa: F401
    from cli.page_tasks import pages  # noqa: F401
    from cli.repository_tasks import (  # noqa: F401
        repo_add,
        repo_client,
        repo_diff,
        repo_fsck,
        repo_gc,
        repo_import,
        repo_list,
        repo_log,
        repo_pages,
        repo_promote,
        repo_queue,
        repo_remove,
        repo_rollback,
        repo_serve,
        repo_show,
        repo_sync,
        repo_why,
    )


# ---- farmhand's own development, where its tests are.

if (ROOT / "tests").is_dir():
    from tests.dev.tasks import bench, lab_down, lab_ssh, lab_test, lab_up, lint, test  # noqa: F401
