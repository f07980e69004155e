"""The VMs of a build: one connection each, memory, clock, and what the record says of them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from builds import mark
from builds.meter import Meter
from builds.record import FileRecord, VmRecord, replace_file
from builds.root import no_root
from builds.source import Resolved, offered, pack, variables
from host.printable import last_line
from hypervisors.api import WARM, Machine
from inventory.errors import FarmhandError, Unsupported, WrongState
from inventory.sizes import format_duration, format_size
from provision.clean_state import AddedTools, clean_state
from provision.engine.runner import perform
from provision.guest.connection import Connection
from provision.guest.ssh_connection import in_thread
from provision.member import Member, is_on
from provision.operations.balloon import Balloon
from provision.operations.reset import Reset
from provision.power import answers, bring_to_present, console_tail, until_ready
from provision.site import Site

if TYPE_CHECKING:
    from builds.package_cache import PackageCache
    from repositories.serving.server import Server

CLOCK_TOLERANCE = 2.0
"""Seconds a guest's clock may be off before it is set: make(1) and TLS mind, people don't."""
_CONSOLE_LINES = 30

_PACKAGES_MAX = 2**23  # bytes: some 100,000 packages
_TOLD = 100  # packages that came with a VM's clean, in each record; it lists all that are there beside
_PACKAGES = r"""
export LC_ALL=C
{
    ! command -v dpkg-query >/dev/null || dpkg-query -W -f '${Package} ${Version} ${Architecture}\n'
    ! command -v rpm >/dev/null || rpm -qa --qf '%{NAME} %{VERSION}-%{RELEASE} %{ARCH}\n'
} | sort
"""


class Machines:
    """The VMs of one build, used within one event loop. ``note``: tells the record, and the admin, what
    did not work but doesn't stop the build."""

    def __init__(
        self,
        site: Site,
        source: Resolved | None,
        directory: Path,
        meter: Meter,
        note: Callable[[str], None],
    ) -> None:
        self._site = site
        self._directory = directory
        self._source = source
        self.meter = meter
        self._note = note
        self._connections: dict[str, Connection] = {}
        self._offers: dict[str, Mapping[str, str]] = {}  # by VM, as long as its connection lasts
        self._in_use: set[str] = set()  # likewise: by a step
        self._servers: dict[Path, Server | PackageCache] = {}  # by directory: of what is offered
        self._serving = contextlib.ExitStack()
        self._ports: dict[str, dict[Path, int]] = {}  # by VM: where it finds those, on its loopback
        self._carried: dict[str, str] = {}  # by VM: the directory there that a copy of the source is in
        self._packing = asyncio.Lock()
        self._locks: dict[str, asyncio.Lock] = {}
        self._as_it_was: set[str] = set()  # not reset before it was built on
        self._unseen: list[str] = []  # of these, those not yet logged in to
        self._root: dict[str, str] = {}  # by VM: the first step that needs root there
        self._not_reset: set[str] = set()  # a reset was begun and did not succeed
        self.records: dict[str, VmRecord] = {}
        self.templates: dict[str, FileRecord] = {}
        self.packages: list[FileRecord] = []  # that came through the cache for them; known at the end

    # -- as the record sees them --------------------------------------------------------------

    def begin(self, vm: str, *, resets: bool, root: str = "") -> None:
        """Note what the VM is, before anything is done to it. ``resets``: whether this build resets it
        first. If not, it is taken as it is, and the record says so. ``root``: the first step that needs
        root there, if any does."""
        member = Member(self._site, vm)
        if root:
            self._root[vm] = root
        with self.meter.hypervisor():
            capabilities = member.driver.capabilities()
            disk = member.disk()
            record = VmRecord(vm=vm, host=member.host, driver=capabilities.driver)
            if disk is not None:
                record = replace(record, template=disk.template, checkpoint=disk.base)
                own = self._site.identity  # on XenAPI two farms may have that label
                found = [t for t in member.store.templates() if t.label == disk.template]
                template = max(found, key=lambda t: t.farm == own, default=None)
                if template is not None:
                    self.templates[template.label] = FileRecord(
                        name=f"template {template.label}", size=template.size, sha256=template.sha256
                    )
        if not resets:
            record = replace(record, pristine=False)
            self._as_it_was.add(vm)
            self._unseen.append(vm)
            self._note(f"{vm}: taken as it was, not reset in this build: its disk is no known state")
        self.records[vm] = record

    def _update(self, vm: str, **values: object) -> None:
        self.records[vm] = replace(self.records[vm], **values)  # type: ignore[arg-type]

    # -- reset --------------------------------------------------------------------------------

    async def reset(self, vm: str, to: str, say: Callable[[str], None]) -> None:
        """Reset the VM to the checkpoint and start it; returns when it answers as itself. The caller
        keeps the step's limit."""
        site, member = self._site, Member(self._site, vm)
        await self.drop(vm)
        self._not_reset.add(vm)
        self._update(vm, pristine=False)
        since = time.monotonic()
        with self.meter.hypervisor():
            outcome = await in_thread(lambda: perform(site, Reset((vm,), to, wait=False)))
        self._not_reset.remove(vm)
        self._carried.pop(vm, None)
        self._ports.pop(vm, None)
        proof = outcome.result.vms[vm].proof
        self._update(
            vm,
            checkpoint=proof.checkpoint,
            pristine=proof.pristine if vm not in self._as_it_was else False,
            template=proof.template or self.records[vm].template,
            tools=self._tools(vm, proof.checkpoint),
            memory_seal=proof.memory, beyond_proof=proof.beyond,
            packages="", packages_sha256="", packages_count=0,
        )  # fmt: skip
        for action in outcome.actions:
            say(f"{action}")
        say(f"disk is checkpoint {proof.checkpoint}: {_proven(proof.pristine)}")
        if tools := self.records[vm].tools:
            say(f"that is {' with '.join(filter(None, (tools.template, tools.words)))}")
        if proof.memory:
            say(f"memory is that of checkpoint {proof.checkpoint}, sha256 {proof.memory}")
            say(f"not proven: {proof.beyond}")
        with self.meter.guest():
            began = since if member.can_power else float("-inf")
            ready = await until_ready(member, since=began, asleep=bool(proof.memory))
        self._update(vm, boot_id=ready.boot_id, clock_skew=round(ready.skew, 3), clock_set=False)
        say(f"answers on ssh {format_duration(time.monotonic() - since)} after the reset began")
        say(f"boot {ready.boot_id}")
        await self._connected(vm)  # what is needed there is looked at now, not when its turn comes

    def _tools(self, vm: str, checkpoint: str) -> AddedTools | None:
        """What that checkpoint has beside its template, where it is the VM's ``clean``, or the warm one
        that was made of that."""
        disk = Member(self._site, vm).disk()
        if disk is None:
            return None
        clean = clean_state(self._site.paths, vm, disk)
        if clean.tools is None:
            return None
        told = replace(clean.tools, packages=clean.tools.packages[:_TOLD])
        if checkpoint == clean.checkpoint:
            return told
        if not checkpoint == WARM == self._site.farm.vms[vm].reset_to:
            return None
        since = datetime.fromisoformat(clean.tools.made)
        later = any(kept.name == WARM and kept.created >= since for kept in disk.checkpoints)
        return told if later else None

    # -- connections --------------------------------------------------------------------------

    async def connection(self, vm: str) -> Connection:
        """The VM's one connection, for work there. Its clock is right, and it is marked as this build's.
        WrongState if its reset failed in this build: nothing is built on a disk that isn't its
        checkpoint."""
        if vm in self._not_reset:
            raise WrongState("its reset failed, so it is not used in this build", vm=vm)
        async with self._locks.setdefault(vm, asyncio.Lock()):
            connection = await self._connected(vm)
            if vm not in self._in_use:
                with self.meter.guest():
                    await self._look(vm, connection)
                    await self._mark(vm, connection)
                self._in_use.add(vm)
            return connection

    async def look(self) -> None:
        """Check, before the first step, that VMs taken as they are can be built on. For the others their
        reset tells."""
        while self._unseen:
            await self._connected(self._unseen.pop())

    async def ask_for_root(self) -> None:
        """Check, before anything is done, that VMs that answer give root where a step needs it. What
        else is wrong there may be why they are reset."""
        for vm, step in self._root.items():
            member = Member(self._site, vm)
            if not await in_thread(partial(answers, member)):
                continue
            try:
                async with await Connection.open(member.endpoint()) as connection:
                    may = await connection.may_be_root()
            except FarmhandError:
                continue
            if not may:
                raise no_root(self._site, vm, f"step {step}")

    async def _connected(self, vm: str) -> Connection:
        connection = self._connections.get(vm)
        if connection is None or connection.closed:
            await self.drop(vm)
            with self.meter.guest():
                member = Member(self._site, vm)
                await in_thread(lambda: bring_to_present(member))
                endpoint = member.endpoint()
                connection = await Connection.open(endpoint, runner=self._site.runner)
            self._connections[vm] = connection
            for directory, port in self._ports.get(vm, {}).items():  # where it was told it would be
                try:
                    with self.meter.guest():
                        await connection.offer_port(self._servers[directory].port, directory, there=port)
                except Unsupported as error:
                    self._note(f"{vm}: it no longer reaches {directory}: {error.message}")
            if vm in self._root:
                with self.meter.guest():
                    may = await connection.may_be_root()
                if not may:
                    await self.drop(vm)
                    raise no_root(self._site, vm, f"step {self._root[vm]}")
        return connection

    async def _look(self, vm: str, connection: Connection) -> None:
        ready = await connection.facts()
        self._update(vm, boot_id=ready.boot_id, clock_skew=round(ready.skew, 3))
        if abs(ready.skew) <= CLOCK_TOLERANCE:
            return
        try:
            left = await connection.set_clock()
        except FarmhandError as error:
            if connection.closed:
                raise
            self._note(f"{vm}: its clock is {ready.skew:+.1f} s off and can't be set: {error.message}")
            return
        self._update(vm, clock_set=True)
        self._note(f"{vm}: its clock was {ready.skew:+.1f} s off; set, {left:+.2f} s left")

    async def _mark(self, vm: str, connection: Connection) -> None:
        """Write into the VM that it holds this build's work from now on."""
        said: list[bytes] = []
        env = {"FARM": self._site.farm.farm, "BUILD_ID": self._directory.name}
        done = await connection.run(mark.WRITE, env=env, timeout=120, log=said.append)
        if done.status:
            why = last_line(b"".join(said).decode(errors="replace"), 300) or f"status {done.status}"
            self._note(f"{vm}: it can't be marked as this build's, so --from can't be verified: {why}")

    async def drop(self, vm: str) -> None:
        """Close the VM's connection, if there is one."""
        self._offers.pop(vm, None)
        self._in_use.discard(vm)
        connection = self._connections.pop(vm, None)
        if connection is not None:
            await connection.close()

    async def drop_all(self) -> None:
        """Close all connections, at the end. What was copied there for the build is removed."""
        await asyncio.gather(*(self._tidy(vm) for vm in list(self._carried)))
        await asyncio.gather(*(self.drop(vm) for vm in list(self._connections)))
        for packed in self._directory.glob(".*.tar"):
            packed.unlink()
        await in_thread(self._serving.close)

    async def _tidy(self, vm: str) -> None:
        there, connection = self._carried.pop(vm), self._connections.get(vm)
        if connection is not None and not connection.closed:
            with contextlib.suppress(FarmhandError):
                await connection.output(f"rm -rf {shlex.quote(there)}")

    async def source(self, vm: str) -> Mapping[str, str]:
        """Variables that tell the VM's scripts where the source is. SOURCE_URL is "" without a
        source."""
        source = self._source
        if source is None:
            return {"SOURCE_URL": ""}
        if source.repository is None:
            return {"SOURCE_URL": source.url}
        connection = await self.connection(vm)
        if vm not in self._offers:
            with self.meter.guest():
                repositories = offered(source)
                try:
                    urls = [
                        await connection.offer_git(where, name=name)
                        for name, (where, _) in repositories.items()
                    ]
                except Unsupported as error:
                    if vm not in self._carried:
                        self._note(f"{error.message}; a copy is carried there instead")
                    try:
                        there = await self._carry_source(vm, connection, source)
                    except FarmhandError as second:
                        second.remedy = second.remedy or error.remedy
                        raise
                    urls = [f"file://{quote(there)}/{name}.git" for name in repositories]
            self._offers[vm] = variables(source, urls)
        return self._offers[vm]

    async def offer(self, vm: str, directory: Path) -> str:
        """Serve a repository's directory to the VM through its connection, until the build's end.
        Returns its URL there. Unsupported: its sshd forwards no ports."""
        from repositories.serving.server import Server

        return await self._offer_port(vm, directory, lambda: Server(directory))

    async def package_cache(self, vm: str) -> Mapping[str, str]:
        """Variables that lead the VM's programs to the cache for packages; none where the cycle has no
        such cache. Unsupported: its sshd forwards no ports."""
        farm = self._site.farm
        if farm.cycle is None or not farm.cycle.package_cache:
            return {}
        from builds.package_cache import PackageCache, sources_of

        home = self._site.paths.root / "package-cache"
        url = await self._offer_port(
            vm, home,
            lambda: PackageCache(home, sources_of(farm), self.packages.extend, self._note),
        )  # fmt: skip
        return {"http_proxy": url, "no_proxy": "127.0.0.1,localhost"}

    async def _offer_port(
        self, vm: str, directory: Path, serve: Callable[[], Server | PackageCache]
    ) -> str:
        connection = await self.connection(vm)
        if directory not in self._servers:
            self._servers[directory] = server = serve()
            await in_thread(lambda: self._serving.enter_context(server))
        ports = self._ports.setdefault(vm, {})
        if directory not in ports:
            with self.meter.guest():
                ports[directory] = await connection.offer_port(self._servers[directory].port, directory)
        return f"http://127.0.0.1:{ports[directory]}"

    async def _carry_source(self, vm: str, connection: Connection, source: Resolved) -> str:
        """Copy what is offered to a directory of its own in the login's home. It stays until the end, or
        the VM's reset."""
        if vm in self._carried:
            return self._carried[vm]
        packed = self._directory / f".{source.name}.tar"
        async with self._packing:
            if not packed.exists():
                await in_thread(lambda: pack(self._site.runner, source, packed))
        there = (await connection.output('mktemp -d "$HOME/.farmhand-source-XXXXXX"')).rstrip("\n")
        self._carried[vm] = there
        tar = shlex.quote(packed.name)
        try:
            await connection.put([packed], there)
            await connection.output(f"cd {shlex.quote(there)}; tar -xf {tar}; rm {tar}", timeout=600)
        except BaseException:
            await self._tidy(vm)
            raise
        return there

    async def list_packages(self, vm: str) -> None:
        """Write the packages installed before the build to a file of the record, once per boot."""
        if self.records[vm].packages:
            return
        connection = await self.connection(vm)
        try:
            with self.meter.guest():
                text = await list_installed(connection)
        except FarmhandError as error:
            if connection.closed:
                raise
            self._note(f"{vm}: its packages could not be listed: {error.message}")
            return
        name = f"packages-{vm}.txt"
        replace_file(self._directory / name, text, durable=False)
        self._update(
            vm,
            packages=name,
            packages_sha256=hashlib.sha256(text.encode()).hexdigest(),
            packages_count=len(text.splitlines()),
        )

    # -- memory -------------------------------------------------------------------------------

    async def inflate(self, vm: str) -> None:
        """Give an idle VM its full memory before it builds. A failure is a note."""
        full = Member(self._site, vm).declared.memory
        machine = await self._idling(vm)
        if machine is not None and machine.current < full:
            await self._balloon(vm, full)
        elif machine is not None:
            self._update(vm, memory=full)

    async def deflate(self, vm: str) -> None:
        """Take it back to its idle memory, whatever became of the build. A failure is a note."""
        idle = Member(self._site, vm).declared.idle_memory
        machine = await self._idling(vm)
        if idle is not None and machine is not None and is_on(machine) and machine.current != idle:
            await self._balloon(vm, idle)

    async def _idling(self, vm: str) -> Machine | None:
        """The machine of a VM that has less memory while it idles; None for others."""
        member = Member(self._site, vm)
        if not member.idles:
            return None
        with self.meter.hypervisor():
            try:
                return await in_thread(lambda: member.driver.find(member.machine))
            except FarmhandError as error:
                self._note(f"{vm}: its memory can't be looked at: {error.message}")
                return None

    async def _balloon(self, vm: str, target: int) -> None:
        try:
            with self.meter.hypervisor():
                await in_thread(lambda: perform(self._site, Balloon(vm, target)))
            if target == self._site.farm.vms[vm].memory:
                self._update(vm, memory=target)
        except FarmhandError as error:
            self._note(f"{vm}: memory could not be set to {format_size(target)}: {error.message}")

    # -- when things go wrong -----------------------------------------------------------------

    def console(self, vm: str) -> str:
        """The last lines of its console; "" if there are none."""
        return console_tail(Member(self._site, vm), lines=_CONSOLE_LINES)

    def state(self, vm: str) -> str:
        """Its power state in a word, as the hypervisor tells it now; "" if nobody can."""
        try:
            member = Member(self._site, vm)
            machine = member.driver.find(member.machine)
        except FarmhandError as error:
            return f"its hypervisor does not answer ({error.message})"
        return "it is gone" if machine is None else f"it is {machine.power} now"


async def list_installed(connection: Connection) -> str:
    """The packages that are installed there, a line each: NAME VERSION ARCHITECTURE."""
    return await connection.output(_PACKAGES, timeout=120, most=_PACKAGES_MAX)


def _proven(pristine: bool | None) -> str:
    return "proven by the disk store" if pristine is True else "on the word of its reset command"
