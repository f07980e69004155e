"""network-verify: the live services, asked as their clients do.

A DHCP exchange for each VM (the lease of one that isn't made is given back), forward and reverse
queries to the server itself, a request through each proxy name and a connection through each NAT port,
the last two compared with what the VM itself answers. What can't be told (the VM is off) is said, and is
not taken for right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from inventory.errors import FarmhandError
from provision.member import Member
from provision.network import readiness
from provision.network.dhcp_probe import probe
from provision.network.file_change import FileChange
from provision.network.rendered import chosen
from provision.network.service import NotAsked, Question, Service, Silent, Unserved
from provision.network.service import services as services_of
from provision.network.state import StateFile
from provision.network.view import VmRow, view
from provision.site import Site

_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """``ok`` None: it could not be told, and ``why`` says why. ``vm``: empty of a service as a whole."""

    service: str
    vm: str
    text: str
    expected: str
    seen: str
    ok: bool | None
    why: str = ""

    def as_dict(self) -> dict[str, object]:
        return {
            "service": self.service,
            "vm": self.vm,
            "question": self.text,
            "expected": self.expected,
            "seen": self.seen,
            "ok": self.ok,
            "why": self.why,
        }


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """``planned``: what would be asked; then nothing was."""

    answers: tuple[Answer, ...]
    planned: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.wrong

    @property
    def wrong(self) -> tuple[Answer, ...]:
        return tuple(answer for answer in self.answers if answer.ok is False)

    @property
    def unknown(self) -> tuple[Answer, ...]:
        return tuple(answer for answer in self.answers if answer.ok is None)

    def as_dict(self) -> dict[str, object]:
        return {
            "verified": self.ok,
            "questions": list(self.planned),
            "answers": [answer.as_dict() for answer in self.answers],
        }


def network_verify(site: Site, services: Sequence[str] = (), vms: Sequence[str] = ()) -> VerifyReport:
    """Ask about the VMs that have allocations, or those named. In a plan it only says what it would
    ask."""
    names = chosen(site, services)
    recorded = site.allocator.recorded()
    wanted = [vm for vm in site.vms(vms or None) if vm in recorded or not Member(site, vm).info.virtual]
    seen = view(site.farm, {vm: recorded[vm] for vm in wanted if vm in recorded})
    rows = {str(row.vm): row for row in seen.vms if row.vm in wanted}
    meant = [service for service in services_of(site.farm) if service.NAME in names]
    found = [question for service in meant for question in service.questions(site.farm, seen, rows)]
    servers = [s.NAME for s in meant if s.ANSWERS_DHCP] if site.farm.network.bridge else []
    asked = [row for row in rows.values() if row.mac and row.address] if servers else []
    if site.plan:
        dhcp = [f"dhcp: {row.vm}: exchange for {row.mac}, expect {row.address}" for row in asked]
        return VerifyReport((), (*dhcp, *(f"{q.service}: {q.vm}: {q.text}" for q in found)))
    answers = list(_not_live(site, meant))
    answers += _dhcp(site, ", ".join(servers), asked) if asked else ()
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="verify") as pool:
        answers += pool.map(_answer, found)
    return VerifyReport(tuple(answers))


def _not_live(site: Site, services: Sequence[Service]) -> Iterator[Answer]:
    """What daemons lack, or haven't of the files that we wrote: wrong, whatever else they answer."""
    farm, runner = site.farm, site.runner
    files = list(_files(site, {service.NAME for service in services}))
    asked = [service for service in services if any(c.service == service.NAME for c in files)]
    missing = [*readiness.missing(runner, farm, asked, files)]
    found = [(name, error.message) for name, error in missing]
    found += [
        (name, error.message) for name, error, now in readiness.not_included(runner, asked, files) if now
    ]
    there = [service for service in asked if service.NAME not in dict(missing)]
    for name, one in (
        *readiness.stopped(runner, farm, there),
        *readiness.unserved(runner, farm, there, files),
    ):
        found.append((name, one.text if isinstance(one, Unserved) else one.message))
    for name, seen in found:
        yield Answer(name, "", "it serves what its files say", "yes", seen, False)


def _files(site: Site, services: Collection[str]) -> Iterator[FileChange]:
    """Those that were applied, as they are."""
    for path, document in StateFile.below(site.paths.root).read().files.items():
        if document.service in services:
            with contextlib.suppress(OSError):
                text = Path(path).read_text(errors="surrogateescape")
                yield FileChange(document.service, path, text, text, document.mode, zone=document.zone)


def _dhcp(site: Site, servers: str, rows: Sequence[VmRow]) -> Iterator[Answer]:
    bridge = site.farm.network.bridge or ""
    why = ""
    found: Mapping[str, str] = {}
    try:
        unmade = [row.mac for row in rows if not _may_run(Member(site, row.vm))]
        found = probe(site.runner, bridge, [row.mac for row in rows], give_back=unmade)
    except FarmhandError as error:
        why = f"could not be asked: {error.message}"
    for row in rows:
        seen = why or found.get(row.mac, str(Silent()))
        text = f"exchange for {row.mac}, expect {row.address}"
        known = None if why else seen == row.address
        yield Answer(servers, row.vm, text, str(row.address), seen, known, why)


def _may_run(member: Member) -> bool:
    """Whether it may have a lease of its own: it is made, or its host doesn't tell."""
    if not member.info.virtual:
        return True
    try:
        return member.look() is not None
    except FarmhandError:
        return True


def _answer(question: Question) -> Answer:
    why = ""
    try:
        expected = question.expected()
    except Silent as error:
        expected = str(error)
        why = f"the VM itself: {error}"  # what its proxy or port says then proves nothing
    try:
        seen = question.ask()
    except Silent as error:
        seen = str(error)
    except NotAsked as error:
        seen = why = str(error)
    ok = None if why else seen == expected
    return Answer(question.service, question.vm, question.text, expected, seen, ok, why)
