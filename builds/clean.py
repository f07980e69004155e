"""clean: a VM's checkpoint ``clean`` remade, from its template and with tools: a ``confirmed_change``.

1. The VM is shut down, and its present state kept.
2. It goes back to its template and is started; what is wanted is added there as root; it is shut down.
3. That disk is kept as the new ``clean`` (``provision.clean_state``), in one step of its store.
4. It is put back to that, which its store proves, and started. Once its ssh answers, the state of step 1
   and the ``clean`` before are removed. If it goes back, ``clean`` is what it was.

It always begins with the template, not with the ``clean`` before: so what was added is all in one place;
nothing grows from the one before, which can go; and no disk gets slower, however often it is remade.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from builds.package_cache import sources_of
from builds.plan import unprivileged
from builds.record import CYCLE_LOCK
from builds.root import no_root
from builds.tools import ToolsOrder, equip
from host.documents import Malformed, read_file
from host.files import file_error
from hypervisors.api import CLEAN, WARM
from inventory.errors import (
    Call,
    Unsupported,
    UsageError,
    WrongState,
)
from provision.clean_state import (
    BEFORE,
    AddedTools,
    CleanState,
    clean_state,
    is_made_for,
    next_clean,
    note_tools,
    wanted_words,
)
from provision.engine.journal import current_step
from provision.engine.operation import Operation
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.recovery import whole
from provision.engine.report import Action
from provision.engine.run import Run
from provision.member import Member, each, is_on, members_of
from provision.operations import checkpoint
from provision.operations.checkpoint import disk_with_checkpoints
from provision.operations.checkpoint_remove import remove_kept
from provision.operations.confirmed_change import ConfirmedActivity, ConfirmedFacts
from provision.operations.first_warm import first_warm
from provision.operations.reset import prove
from provision.power import check_memory, power_on, then_what, write_identity
from provision.site import Site

_MOST = 100_000  # bytes of a script: it is one argument of a command
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_:=~^-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanFacts(ConfirmedFacts):
    """``new``: the checkpoint of the new ``clean``. ``gone``: those that go once that has answered.
    ``tools``: what it has then."""

    new: str
    gone: tuple[str, ...]
    tools: AddedTools | None = None


class _CleanActivity(ConfirmedActivity[CleanFacts]):
    name = "clean"
    facts = CleanFacts

    def made_anew(self, facts: CleanFacts, _vm: str, _clean: str) -> bool:
        return facts.changed

    def needs_names(self, facts: CleanFacts) -> bool:
        """To the end: what was added isn't noted before."""
        return facts.decided

    def finish(self, member: Member, facts: CleanFacts) -> None:
        """Note what it has, and remove what it takes the place of. What something still grows from
        stays."""
        assert facts.tools
        current_step("note what was added")
        note_tools(member.site.paths, member.vm, facts.tools)
        for name in facts.gone:
            current_step(f"remove checkpoint {name}")
            try:
                remove_kept(member, name)
            except WrongState as error:
                member.site.reporter.warn(error.message, vm=member.vm)

    def roll_back(self, member: Member, facts: CleanFacts) -> None:
        current_step(f"put it back to {facts.kept}")
        member.store.restore(member.machine, facts.kept)
        current_step(f"remove checkpoint {facts.new}")
        remove_kept(member, facts.new)

    def rolled_back(self, facts: CleanFacts) -> str:
        return (
            f"is as it was, and so is its clean; checkpoint {facts.kept} stays: its disk grows from it"
        )

    def finish_words(self, facts: CleanFacts) -> str:
        return f"its clean is {facts.new}; remove the one before"

    def roll_back_words(self, _facts: CleanFacts) -> str:
        return "its clean stays what it was; put it back to how it was before"

    def failure(self, _facts: CleanFacts) -> str:
        return "no new clean"

    def recovered(self, member: Member, facts: CleanFacts) -> None:
        """Of the warm checkpoint that was to be made."""
        assert facts.tools
        if member.declared.reset_to != WARM or _is_kept_since(member, facts.tools):
            return
        try:
            _check_warm_gone(member)
        except WrongState as error:
            member.site.reporter.warn(whole(error), vm=member.vm)
        else:
            again = Call("clone-farm", vm=member.vm)
            text = (f"it has no checkpoint {WARM} of this clean yet: ", again)
            member.site.reporter.warn(text, vm=member.vm)


CLEANED = _CleanActivity()


@dataclass(frozen=True, slots=True)
class CleanResult:
    """By VM, what its ``clean`` has beside its template."""

    vms: Mapping[str, AddedTools] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Clean(Operation[CleanResult]):
    """Remake the checkpoint ``clean`` of VMs, one after the other: their template, with ``packages``
    installed, and then ``script``, the text of ``script_name``, run there as root; with neither, the
    template's own. What was written to their disks goes, as with a reset. Until the new one's ssh
    answers, the present state is kept; if anything fails, the VM goes back to it, and ``clean`` stays.

    A warm checkpoint that resets go back to is made anew after it.

    Errors: UsageError (a name, a script), Unsupported (its host keeps no disks, its guest has no
    network, its login can't be root), ToolsFailed, NoSpace, TimedOut and others of a start, Busy."""

    name = "clean"
    vms: tuple[str, ...]
    packages: tuple[str, ...] = ()
    script: str = ""
    script_name: str = ""

    def __post_init__(self) -> None:
        for package in self.packages:
            if not _PACKAGE.fullmatch(package):
                raise UsageError(
                    f"{package!r} is no package's name",
                    remedy="names as apt-get or dnf take them, such as ccache,git",
                )
        if len(self.script.encode()) > _MOST or "\0" in self.script:
            raise UsageError(
                f"{self.script_name} has more than {_MOST} bytes, or a NUL byte",
                remedy="have the script fetch what it needs",
            )

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms(self.vms)

    def locks(self, site: Site) -> tuple[str, ...]:
        """The cache for packages is a cycle's."""
        return (CYCLE_LOCK,) if self._cached(site) else ()

    def plan(self, run: Run) -> Plan[CleanResult]:
        site, members = run.site, members_of(run.site, run.vms)
        machines = each(members, Member.present)
        done: dict[str, AddedTools] = {}
        jobs: dict[str, list[Job]] = {}
        making: list[Member] = []
        sources = sources_of(site.farm) if self._cached(site) else ()
        for member in members:
            vm, disk = member.vm, disk_with_checkpoints(member, machines[member.vm])
            before = clean_state(site.paths, vm, disk)
            if not self._wanted and not before.added:
                jobs[vm] = [job("keep", vm, f"its clean is {disk.template}, with nothing added")]
                continue
            if self.packages and not sources and _is_offline(member):
                raise Unsupported(
                    f"{site.name}: {vm} has no network: no packages can be installed there",
                    remedy="give the cycle a 'package_cache'; or let the guests out: 'internet: yes' "
                    "under 'network:'; or bring them with a script",
                )
            if self._wanted and unprivileged(site, vm):
                raise no_root(site, vm, "what is added to clean")
            making.append(member)
            new, warm = next_clean(disk), member.declared.reset_to == WARM
            made_before = (
                kept.name for kept in reversed(disk.checkpoints)
                if is_made_for(kept.name, disk.template) or (warm and kept.name == WARM)
            )  # fmt: skip
            facts = CleanFacts(
                kept=BEFORE + new, new=new, gone=(BEFORE + new, *made_before),
                was_on=(vm,) if is_on(machines[vm]) else (),
            )  # fmt: skip
            off = not facts.was_on
            again = first_warm(member, None, new=True, runs=True, then_off=off) if warm else []
            do = partial(self._one, member, facts, disk.template, sources, again, done)
            lines = [Action("clean", vm, self._text(member, facts, before))]
            if warm:
                lines += [action for one in again for action in one.actions]
                lines += [Action("stop", vm, "shut down again")] if off else []
            jobs[vm] = [Job(tuple(lines), do)]
        first = check_memory(making, wait=True)
        stages = [alone(foretold(*first)), *({vm: of} for vm, of in jobs.items())]
        return Plan(stages, lambda: CleanResult(done))

    @property
    def _wanted(self) -> str:
        return wanted_words(self.packages, self.script_name)

    def _cached(self, site: Site) -> bool:
        return bool(self._wanted and site.farm.cycle and site.farm.cycle.package_cache)

    def _text(self, member: Member, facts: CleanFacts, before: CleanState) -> str:
        parts = ["shut down"] if facts.was_on else []
        parts.append(f"go back to {before.template}")
        if self.packages:
            parts.append(f"start, install {', '.join(self.packages)}")
        if self.script:
            parts.append(
                f"{'' if self.packages else 'start, '}run {Path(self.script_name).name} as root"
            )
        parts += ["shut down"] if self._wanted else []
        parts.append(f"keep that as clean ({facts.new}), start{then_what(member, wait=True)}")
        if not facts.was_on and member.declared.reset_to != WARM:
            parts.append("shut down again")
        was = f" ({before.words})" if before.added else ""
        return f"{', '.join(parts)}; until it answers, its clean{was} and its state stay"

    def _one(
        self,
        member: Member,
        facts: CleanFacts,
        template: str,
        sources: Sequence[str],
        again: Sequence[Job],
        done: dict[str, AddedTools],
    ) -> None:
        """``again``: keep it warm, once it answered."""

        def change(facts: CleanFacts) -> CleanFacts:
            return replace(facts, tools=self._make(member, facts, template, sources))

        def then() -> None:
            tools = entry.facts.tools
            assert tools
            done[member.vm] = tools
            what = CleanState(checkpoint=facts.new, template=template, tools=tools)
            many = f" ({len(tools.packages)} packages with what they need)" if tools.packages else ""
            member.site.reporter.say(f"its clean is {what.words}{many}", vm=member.vm)
            for one in again:
                _keep_warm(member, one)

        with member.site.journal.begin(CLEANED, [member.vm], facts) as entry:
            CLEANED.carry_out(member, entry, change, then=then)

    def _make(
        self, member: Member, facts: CleanFacts, template: str, sources: Sequence[str]
    ) -> AddedTools:
        """The new ``clean``, and the machine stopped on it, provably."""
        site = member.site
        current_step(f"put it back to {template}")
        write_identity(member)
        member.store.restore(member.machine, CLEAN)
        came: Sequence[str] = ()
        if self._wanted:
            power_on(member, wait=True)
            current_step(f"add {self._wanted}")
            came = equip(member, ToolsOrder(self.packages, self.script, self.script_name), sources)
            current_step("shut it down")
            member.driver.stop(member.machine, grace=checkpoint.GRACE)
        current_step(f"keep it as {facts.new}")
        kept = member.store.checkpoint(member.machine, facts.new)
        prove([member], {member.vm: facts.new})
        return AddedTools(
            checkpoint=facts.new,
            id=kept.id,
            template=template,
            asked=self.packages,
            packages=tuple(came),
            script=self.script_name,
            script_sha256=hashlib.sha256(self.script.encode()).hexdigest() if self.script else "",
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            by=str(site.requester),
        )


def read_script(path: Path) -> str:
    """Its text. WrongState if it can't be read, UsageError for what is no text."""
    try:
        text = read_file(path).decode()
    except OSError as error:
        raise file_error(error, path, "read") from error
    except (Malformed, UnicodeDecodeError):
        text = ""
    if not text.strip():
        raise UsageError(f"{path} is no script", remedy="a file with text in it is one")
    return text


def _check_warm_gone(member: Member) -> None:
    """WrongState if the warm checkpoint of the ``clean`` before is still there."""
    disk = member.disk()
    if disk is not None and any(kept.name == WARM for kept in disk.checkpoints):
        raise WrongState(
            f"its checkpoint {WARM} is of the clean before, and stays: something grows from it",
            vm=member.vm,
            remedy=(
                "remove that (", Call("checkpoint-list", vm=member.vm), "), then ",
                Call("checkpoint-remove", vm=member.vm, name=WARM),
                "; ", Call("clone-farm", vm=member.vm), " makes it anew",
            ),
        )  # fmt: skip


def _is_kept_since(member: Member, tools: AddedTools) -> bool:
    """Whether its warm checkpoint was made after that clean."""
    disk, then = member.disk(), datetime.fromisoformat(tools.made)
    kept = disk.checkpoints if disk is not None else ()
    return any(one.name == WARM and one.warm and one.created > then for one in kept)


def _keep_warm(member: Member, made: Job) -> None:
    """Make the warm checkpoint anew. WrongState if the one of the ``clean`` before is still there."""
    _check_warm_gone(member)
    if made.run is not None:
        made.run()


def _is_offline(member: Member) -> bool:
    """Whether the farm file itself lets its guest reach nothing."""
    network = member.site.farm.network
    return network.mode == "user" and not network.internet and member.info.forwards
