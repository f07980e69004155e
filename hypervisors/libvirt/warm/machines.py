"""Warm checkpoints of QEMU's machines: see keeping.py for how they are made. Back to one:

1. The machine is stopped, and its disk was put back by its store. The disk is provably the checkpoint:
   its id is the one in the seal, and nothing was written since. Else nothing below is done.
2. The image is checked by its seal, and what must be as it was: QEMU's version, the machine type, the
   accelerator, under KVM the CPU.
3. A paused QEMU is started whose memory is the image's working copy, mapped and copied on write.
4. It loads its devices' state. Its guest's CPUs run.

Right before its guest runs it is marked as about to. Killed within 3 or 4, a paused machine is left:
``settle`` ends it, with the disk unchanged, or lets it run on if it has that mark."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from host.run import Runner
from hypervisors.api import Callbacks, Checkpoint, Disk, Disks, KeptMemory, Leftover, LiveDisks, Owner
from hypervisors.libvirt import guest_agent
from hypervisors.libvirt.domain_state import note_start
from hypervisors.libvirt.domain_xml import read_domain
from hypervisors.libvirt.warm.definition import file_guard, is_incoming, resumed, runs_on
from hypervisors.libvirt.warm.guard import guarded
from hypervisors.libvirt.warm.images import DEFINITION, STATE, MemoryImage, MemoryImages, name_of
from hypervisors.libvirt.warm.keeping import Keeping, check_free, frozen, run_on, top
from hypervisors.libvirt.warm.monitor import Monitor
from hypervisors.libvirt.warm.saving import Saving, restore, save_all
from hypervisors.libvirt.warm.saving import settle as settle_saved
from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, Conflict, DriverFailed, Unsupported, WrongState

if TYPE_CHECKING:
    import libvirt

_START_PAUSED = 1  # libvirt.VIR_DOMAIN_START_PAUSED, a module imported late
_LOADING = 120.0  # seconds
_THAW = 5.0
_CPU = re.compile(r"^(?:vendor_id|cpu family|model|stepping|flags)\s*:.*$", re.MULTILINE)
_KNOWN = {
    "qemu": "QEMU",
    "machine": "its machine type",
    "accelerator": "its accelerator",
    "cpu": "the CPU",
}


class WarmDomains:
    """Those of one farm on one host. ``uri``: what libvirt is reached by, also from another process."""

    def __init__(
        self,
        images: MemoryImages,
        disks: Disks,
        runner: Runner,
        uri: Callable[[], str],
        told: Callbacks,
        *,
        maps: bool,
        saves_paused: bool,
    ) -> None:
        """``maps``: QEMU can map memory from a file, and may; the disks are ``LiveDisks``.
        ``saves_paused``: see ``DomainType``."""
        self._images = images
        self._disks = disks
        self._runner = runner
        self._uri = uri
        self._told = told
        self._maps = maps
        self._saves_paused = saves_paused

    def has_any(self, machine: str) -> bool:
        return bool(self._images.of(machine))

    def in_use(self, machine: str, name: str, domain: libvirt.virDomain) -> bool:
        """Whether the running machine's memory is mapped from that image."""
        image = self._images.of(machine).get(name)
        return image is not None and f"mem-path={image.place}/" in domain.XMLDesc(0)

    # -- there ------------------------------------------------------------------------------------

    def checkpoint_all(
        self, domains: Sequence[libvirt.virDomain], name: str, connection: libvirt.virConnect
    ) -> Mapping[str, Checkpoint]:
        """See ``WarmMachines.checkpoint_all``. The domains run, and are ours."""
        if not self._maps or file_guard(connection.getCapabilities()):
            return self._saved_all(domains, name, connection)
        try:
            return self._kept_all(domains, name, connection)
        except Unsupported as error:  # by what it writes, before any disk was kept
            text = f"{error.message}: its memory is saved by libvirt instead"
            self._told.warn(text)
            return self._saved_all(domains, name, connection)

    def _kept_all(
        self, domains: Sequence[libvirt.virDomain], name: str, connection: libvirt.virConnect
    ) -> Mapping[str, Checkpoint]:
        """As ``checkpoint_all``, by QEMU's migration stream. Unsupported by a QEMU that writes another
        one."""
        disks = self._disks
        assert isinstance(disks, LiveDisks)
        keepings = [Keeping(domain, disks, self._images, name, self._told) for domain in domains]
        for keeping in keepings:
            check_free(keeping.machine, name, self._images)
        with contextlib.ExitStack() as places:
            for keeping in keepings:
                room = 2 * keeping.resident()  # the working copy is one more
                keeping.place = places.enter_context(self._images.new(keeping.machine, name, room))
            for keeping in keepings:
                places.callback(keeping.settle)  # whatever comes of it
                disks.before_live(keeping.machine, name)
            self._told.step(
                f"keep {', '.join(one.machine for one in keepings)}, disk and memory, as {name}"
            )
            with (
                guarded(self._runner, self._uri(), [one.machine for one in keepings]),
                contextlib.ExitStack() as releases,
            ):
                for keeping in keepings:
                    releases.callback(keeping.release)  # each, whatever becomes of the others
                self._take(keepings)
            for keeping in keepings:
                keeping.note(self._runs_on(keeping.domain.XMLDesc(0), connection))
            for keeping in keepings:
                keeping.settle()
            for keeping in keepings:
                keeping.seal()
        return {one.machine: replace(one.kept, warm=True) for one in keepings if one.kept}

    def _saved_all(
        self, domains: Sequence[libvirt.virDomain], name: str, connection: libvirt.virConnect
    ) -> Mapping[str, Checkpoint]:
        """As ``checkpoint_all``, by libvirt's own save and restore."""
        if len(domains) > 1 and not self._saves_paused:
            raise Unsupported(
                f"{', '.join(domain.name() for domain in domains)} can't be kept at one moment here: "
                "libvirt saves one after the other",
                remedy="a warm checkpoint of each; or a cold one of all, without --warm",
            )
        savings = [Saving(domain, name, paused=self._saves_paused) for domain in domains]
        with contextlib.ExitStack() as places:
            for saving in savings:
                check_free(saving.machine, name, self._images)
                disk = self._disks.find(saving.machine)
                if disk is None or name in (kept.name for kept in disk.checkpoints):
                    raise Conflict(
                        f"{saving.machine} has a checkpoint {name} already",
                        remedy="give the new one another name",
                    )
                place = self._images.new(saving.machine, name, saving.size)
                saving.place = places.enter_context(place)
            with guarded(self._runner, self._uri(), [one.machine for one in savings]):
                save_all(savings, self._disks, name, self._told)
            for saving in savings:
                self._told.working(f"sealing the memory of {saving.machine}")
                saving.seal(self._images, self._runs_on(saving.domain.XMLDesc(0), connection))
        return {one.machine: replace(one.kept, warm=True) for one in savings if one.kept}

    @staticmethod
    def _take(keepings: Sequence[Keeping]) -> None:
        # Frozen first: QEMU pauses a quiet guest by itself as soon as all is copied, and an agent that
        # stands still answers nobody.
        with frozen(keepings):
            for keeping in keepings:
                keeping.begin()
            for keeping in keepings:
                keeping.copy()
            for keeping in keepings:
                keeping.hold()
            for keeping in keepings:
                keeping.keep_disk()
            for keeping in keepings:
                keeping.end()
            for keeping in keepings:
                keeping.release()

    def settle(self, machine: str, domain: libvirt.virDomain | None) -> str:
        """See ``WarmMachines.settle``."""
        done: list[str] = []
        if domain is not None and is_half_started(domain):
            done.append(self._settle_start(machine, domain))
        half = self._images.half_made(machine)
        whole: list[str] = []
        for place in half if domain is not None else ():
            assert domain
            if (place / DEFINITION).exists() and not (place / STATE).exists():
                said = settle_saved(
                    domain, place, name_of(place), self._disks, paused=self._saves_paused
                )
                done += [said] if said else []
        if half and isinstance(self._disks, LiveDisks) and self._maps:
            done += self._settle_kept(machine, domain, self._disks)
            disk = self._disks.find(machine)
            ids = {one.name: one.id for one in disk.checkpoints} if disk else {}
            whole = [name for place in half if (name := self._images.finish_unsealed(place, ids))]
            done += [f"its memory is kept as {name}" for name in whole]
        self._images.sweep(machine)
        if len(half) > len(whole) + len(self._images.half_made(machine)):  # set apart, they stay
            done.append("what was kept of its memory was incomplete, and is gone")
        return "; ".join(done)

    def _settle_start(self, machine: str, domain: libvirt.virDomain) -> str:
        """What is about to run may have done so, and written: it is never ended."""
        if read_domain(domain.XMLDesc(0)).starts:
            self._told.step(f"let {machine} run on")
            domain.resume()
            note_start(domain)
            return "it was given its memory back, stood still, and runs on"
        self._told.step(f"end {machine}, whose start was cut off")
        domain.destroy()
        return "it was being given its memory back: it is off, its disk unchanged"

    @staticmethod
    def _settle_kept(machine: str, domain: libvirt.virDomain | None, disks: LiveDisks) -> list[str]:
        if domain is None or not domain.isActive():
            disks.settle_live(machine, None)
            return []
        monitor = Monitor(domain)
        disks.settle_live(machine, top(monitor)[1])
        stood = run_on(domain, monitor)
        guest_agent.thaw(domain)  # frozen by who was killed, perhaps
        return ["it stood still, and runs on"] if stood else []

    # -- and back ---------------------------------------------------------------------------------

    def suspended(self, disk: Disk, *, sure: bool = False) -> MemoryImage | None:
        """The image that this stopped machine's disk goes with now; None: it goes with none. ``sure``:
        prove it, however long that takes."""
        image = self._images.of(disk.machine).get(disk.base)
        if image is None:
            return None
        if not any((c.name, c.id) == (disk.base, image.seal.disk) for c in disk.checkpoints):
            return None
        same = self._disks.pristine(disk.machine, disk.base, quick=not sure)
        return image if same or (same is None and not sure) else None

    def run_on(
        self, image: MemoryImage, definition: str, disk: Path, connection: libvirt.virConnect
    ) -> libvirt.virDomain:
        """Steps 2 to 4. The caller has seen by ``suspended`` that disk and image belong together.
        ``definition``: the stopped machine's. WrongState if the image can't be used."""
        import libvirt

        image.check()
        if trouble := self._trouble(image, connection):
            raise _not_usable(image, trouble)
        if image.seal.how == "read":
            domain = connection.lookupByName(image.seal.machine)
            restore(domain, image.place, self._disks, paused=self._saves_paused)
            return domain
        memory = image.face(self._images.reader)
        then = (image.place / DEFINITION).read_text(encoding="utf-8")
        xml = resumed(then, definition, disk, memory, image.seal.size)
        domain = connection.createXML(xml, _START_PAUSED)
        try:
            monitor = Monitor(domain)
            state = os.open(image.place / STATE, os.O_RDONLY | os.O_CLOEXEC)
            try:
                monitor.run("getfd", file=state, fdname="farmhand")
            finally:
                os.close(state)
            monitor.run("migrate-incoming", uri="fd:farmhand")
            if not monitor.wait("completed", limit=_LOADING):
                raise DriverFailed(f"{domain.name()}: QEMU did not load its state in {_LOADING:g} s")
            note_start(domain, pending=True)  # one without it never ran, see ``settle``
            domain.resume()
            if image.seal.quiesced:  # it was kept with its file systems frozen
                guest_agent.thaw(domain, patience=_THAW)
        except BaseException:
            with contextlib.suppress(libvirt.libvirtError):
                domain.destroy()
            raise
        return domain

    # -- what there is ----------------------------------------------------------------------------

    def memories(
        self, machine: str, connection: Callable[[], libvirt.virConnect]
    ) -> Mapping[str, KeptMemory]:
        """Those of its present disk's checkpoints."""
        images = self._images.of(machine)
        disk = self._disks.find(machine) if images else None
        ids = {one.name: one.id for one in disk.checkpoints} if disk else {}
        found: dict[str, KeptMemory] = {}
        for name, image in images.items():
            if ids.get(name) != image.seal.disk:
                continue
            kept = image.kept()
            found[name] = replace(kept, trouble=kept.trouble or self._trouble(image, connection()))
        return found

    def forget(self, machine: str, name: str | None = None) -> None:
        """One image, or all of the machine's."""
        self._images.remove(machine, name)

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        self._images.adopt(machine, whose)

    def rename(self, machine: str, to: str, owner: Owner) -> None:
        """See ``Hypervisor.rename``."""
        for name, image in self._images.of(machine).items():
            if image.seal.how == "read":
                raise Unsupported(
                    f"the memory of {machine}'s checkpoint {name} was saved by libvirt, under that name",
                    remedy=("remove it first: ", Call("checkpoint-remove", vm=image.seal.vm, name=name)),
                )
        self._images.rename(machine, to, owner, self._told.step)

    def leftovers(self) -> Sequence[Leftover]:
        return list(self._images.leftovers(self._ids()))

    def discard(self, leftover: Leftover) -> None:
        self._images.discard(leftover, self._ids())

    def _ids(self) -> Mapping[str, Mapping[str, str]]:
        return {disk.machine: {c.name: c.id for c in disk.checkpoints} for disk in self._disks.list()}

    def _trouble(self, image: MemoryImage, connection: libvirt.virConnect) -> str:
        """Why it can't run on here; "" if it can."""
        now = self._runs_on((image.place / DEFINITION).read_text(encoding="utf-8"), connection)
        for what, then in image.seal.runs_on.items():
            if now.get(what) != then:
                name = _KNOWN.get(what, what)
                if what == "cpu":
                    return f"{name} of this host isn't the one that it was kept on"
                return f"{name} was {then} when it was kept, and is {now.get(what) or 'none'}"
        return ""

    @staticmethod
    def _runs_on(xml: str, connection: libvirt.virConnect) -> Mapping[str, str]:
        version = connection.getVersion()
        found = {**runs_on(xml), "qemu": f"{version // 10**6}.{version // 1000 % 1000}.{version % 1000}"}
        if found["accelerator"] == "kvm":
            found["cpu"] = _cpu()
        return found


def is_half_started(domain: libvirt.virDomain) -> bool:
    """Whether it was being given its memory back when whoever did that was killed: one that was seen to
    run carries the mark of its start, and stands still for another reason."""
    import libvirt

    if not domain.isActive() or domain.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
        return False
    xml = domain.XMLDesc(0)
    return is_incoming(xml) and read_domain(xml).started is None


def _not_usable(image: MemoryImage, trouble: str) -> WrongState:
    seal = image.seal
    return WrongState(
        f"the memory of {seal.machine}'s checkpoint {seal.checkpoint} can't be used: {trouble}",
        remedy=("boot it from that checkpoint's disk: ",
                Call("reset", vm=seal.vm, to=seal.checkpoint, cold=True)),
    )  # fmt: skip


def _cpu() -> str:
    """What tells this host's CPU from another kind: its guests under KVM see all of it (proc(5))."""
    first, _, _ = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")
    return hashlib.sha256("\n".join(_CPU.findall(first)).encode()).hexdigest()[:16]
