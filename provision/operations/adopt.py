"""adopt: VMs and templates of another farm of this name become this farm's; and so does its state, where
that was made for another farm file, or elsewhere.

For a controller that is lost, or is to end: afterwards they are none of its any more, and its commands
are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, NotFound, UsageError, WrongState, some
from provision.engine.facts import Facts
from provision.engine.journal import Entry
from provision.engine.operation import Activity, Operation, Recovery
from provision.engine.plan import Job, Plan, alone, job
from provision.engine.record import Record
from provision.engine.report import Action
from provision.engine.run import Run
from provision.guest import identity
from provision.namesakes import Namesake, NamesakeTemplate, namesakes, templates_of_namesakes
from provision.site import Site
from provision.template_recipe import left_alone


@dataclass(frozen=True, slots=True)
class AdoptFacts(Facts):
    """``machine``: its name on ``host``. ``mark``: whose it was."""

    host: str
    machine: str
    mark: str


class _AdoptActivity(Activity[AdoptFacts]):
    """Recovery finishes it: each of a VM's things is marked by itself."""

    name = "adopt"
    facts = AdoptFacts

    def recover(self, site: Site, record: Record, facts: AdoptFacts) -> Recovery[AdoptFacts]:
        if facts.host not in site.farm.hosts:
            return Recovery(f"its host {facts.host} is no longer declared; noted")
        return Recovery("finish it", partial(_take_over, site, record.vm))


@dataclass(frozen=True, slots=True)
class AdoptTemplateFacts(Facts):
    """``label``: of the generation in the store of ``host``. ``mark``: whose it was."""

    host: str
    label: str
    mark: str


class _AdoptTemplateActivity(Activity[AdoptTemplateFacts]):
    """Recovery finishes it."""

    name = "adopt-template"
    facts = AdoptTemplateFacts

    def recover(
        self, site: Site, record: Record, facts: AdoptTemplateFacts
    ) -> Recovery[AdoptTemplateFacts]:
        del record
        if facts.host not in site.farm.hosts or not site.has_disks(facts.host):
            return Recovery(f"its host {facts.host} is no longer declared with a store; noted")
        return Recovery("finish it", partial(_mark_template, site))


ADOPT = _AdoptActivity()
ADOPT_TEMPLATE = _AdoptTemplateActivity()


def _take_over(site: Site, vm: str, entry: Entry[AdoptFacts]) -> None:
    """Mark it as ours; and note, as its clone did, whether it keeps its image's host key. Safe to do
    again."""
    facts = entry.facts
    site.hypervisor(facts.host).adopt(facts.machine, FarmIdentity.of(facts.mark))
    if not site.has_disks(facts.host):
        return
    store = site.disks(facts.host)
    disk = store.find(facts.machine)
    if disk is not None:
        found = {one.farm: one for one in store.templates() if one.label == disk.template}
        sealed = found.get(FarmIdentity.of(facts.mark)) or found.get(site.identity)
        own = left_alone(site, disk.template.rpartition("@")[0], sealed)
        identity.expect_own_key(site.paths, vm, own=own)


def _mark_template(site: Site, entry: Entry[AdoptTemplateFacts]) -> None:
    facts = entry.facts
    site.disks(facts.host).adopt_template(facts.label, FarmIdentity.of(facts.mark))


def _refuse_elsewhere(site: Site, one: Namesake) -> None:
    """WrongState where its disk is there, and not in the store that this farm has for it."""
    machine = site.hypervisor(one.host, look=True).find(one.machine)
    if machine is None or machine.disk is None or site.far(one.host) or not machine.disk.exists():
        return
    if site.has_disks(one.host) and site.disks(one.host).find(one.machine) is None:
        raise WrongState(
            f"{site.name}: the disk of {one.machine} on host {one.host}, {machine.disk}, is not in the "
            "store that the farm file names for it",
            remedy="name its store in the farm file, as 'disks' of that host",
            vm=one.vm,
        )


@dataclass(frozen=True, slots=True)
class AdoptResult:
    """``vms`` and ``templates``: those that are this farm's from now on. ``of``: whose they were."""

    vms: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    of: str = ""


@dataclass(frozen=True, slots=True)
class Adopt(Operation[AdoptResult]):
    """Take over VMs of another farm of this name: these; or all that there are, and its templates.
    ``of``: the beginning of its number, where there are several such farms. The site is open for it
    (``adopting``).

    Errors: NotFound (no such VM of another farm), UsageError (several other farms), Busy."""

    name = "adopt"
    at_any_time = True
    vms: tuple[str, ...] = ()
    of: str = ""

    def affected(self, site: Site) -> tuple[str, ...]:
        return tuple(dict.fromkeys(found.vm for found in self._chosen(site)))

    def plan(self, run: Run) -> Plan[AdoptResult]:
        site = run.site
        found = self._chosen(site)
        sealed = [] if self.vms else self._sealed(site, found)
        jobs: list[Job] = []
        if text := site.keeper.taken_over():
            jobs.append(job("adopt", "", text, site.keeper.take_over))
        jobs += [self._job(site, one) for one in found]
        own = {(host, t.label) for host in {one.host for one in sealed} for t in site.templates(host)}
        jobs += [
            _stays(one) if (one.host, one.label) in own else _template_job(site, one) for one in sealed
        ]
        if not jobs:
            jobs.append(job("keep", "", "there is nothing of another farm of this name"))
        vms = tuple(one.vm for one in found)
        labels = [one.label for one in sealed if (one.host, one.label) not in own]
        of = next((str(whose) for whose in _owners(found, sealed)), "")
        result = AdoptResult(vms, tuple(dict.fromkeys(labels)), of)
        return Plan([alone(*jobs)], lambda: result)

    def _chosen(self, site: Site) -> Sequence[Namesake]:
        found = [one for host in site.farm.hosts for one in namesakes(site, host)]
        found = [one for one in found if one.whose.id.startswith(self.of)]
        if self.vms:
            there = {one.vm for one in found}
            if missing := [vm for vm in self.vms if vm not in there]:
                raise NotFound(
                    f"{site.name}: no other farm of this name has {some(missing)} here",
                    remedy=f"others have {some(sorted(there))}" if there else "",
                )
            found = [one for one in found if one.vm in self.vms]
        _refuse_several(site, _owners(found))
        return found

    def _sealed(self, site: Site, vms: Sequence[Namesake]) -> Sequence[NamesakeTemplate]:
        found = [one for host in site.farm.hosts for one in templates_of_namesakes(site, host)]
        found = [one for one in found if one.whose.id.startswith(self.of)]
        _refuse_several(site, _owners(vms, found))
        return found

    def _job(self, site: Site, one: Namesake) -> Job:
        _refuse_elsewhere(site, one)
        text = f"take {one.machine} on host {one.host} over from farm {one.whose}"
        return Job((Action("adopt", one.vm, text),), partial(self._take, site, one, text))

    def _take(self, site: Site, one: Namesake, text: str) -> None:
        facts = AdoptFacts(one.host, one.machine, one.whose.mark)
        with site.journal.begin(ADOPT, [one.vm], facts) as entry:
            _take_over(site, one.vm, entry)
        site.reporter.say(text, vm=one.vm)
        if identity.keeps_own_key(site.paths, one.vm):
            return  # its key is its image's; whom it lets in, too
        if one.vm in site.farm.vms and not identity.host_key(site.paths, one.vm):
            site.reporter.warn(
                (
                    "its keys are the other farm's: to log in, give it new ones: ",
                    Call("reset", vm=one.vm),
                ),
                vm=one.vm,
            )


def _owners(vms: Sequence[Namesake], templates: Sequence[NamesakeTemplate] = ()) -> list[FarmIdentity]:
    return list(dict.fromkeys([*(one.whose for one in vms), *(one.whose for one in templates)]))


def _refuse_several(site: Site, whose: Sequence[FarmIdentity]) -> None:
    if len(whose) > 1:
        them = some([str(one) for one in whose])
        raise UsageError(
            f"{site.name}: several other farms of this name are here: {them}",
            remedy=("say whose: ", Call("adopt", of=whose[0].short)),
        )


def _stays(one: NamesakeTemplate) -> Job:
    text = f"template {one.label} on host {one.host} stays farm {one.whose}'s: this farm has one, too"
    return job("note", "", text)


def _template_job(site: Site, one: NamesakeTemplate) -> Job:
    text = f"take template {one.label} on host {one.host} over from farm {one.whose}"

    def take() -> None:
        facts = AdoptTemplateFacts(one.host, one.label, one.whose.mark)
        with site.journal.begin(ADOPT_TEMPLATE, (), facts) as entry:
            _mark_template(site, entry)
        site.reporter.say(text)

    return job("adopt", "", text, take)
