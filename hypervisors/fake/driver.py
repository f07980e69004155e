"""A hypervisor and a disk store in memory, that ship: ``driver: fake`` lets an admin try every command
out, and the contract's tests hold both to the same behaviour as the real ones. The hypervisor works over
any disk store; a change of a machine and one of its disk are two, as in reality.

With a state file all processes see the same machines (``hypervisors.fake.world``). Guests do not exist;
a running machine's balloon always obeys, down to a floor of a quarter of its maximum. ``write`` stands
for a guest that writes to its disk; what it holds in memory is a word (``memory_of``, ``remember``).
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from hypervisors.api import (
    ON,
    Capabilities,
    Capacity,
    Checkpoint,
    Console,
    DeviceDisks,
    Disk,
    Disks,
    Foreign,
    KeptMemory,
    Leftover,
    LiveDisks,
    Machine,
    MachineSpec,
    MemoryShare,
    MemoryUse,
    Owner,
    Power,
    StepFn,
    Template,
    check_larger,
    check_one_of,
    check_removable,
    check_template,
    disk_with_data,
    is_fresh,
    label_taken,
    no_step,
    no_warm,
    not_ours,
    spec_hash,
    template_in_use,
    too_small,
    without_machine,
)
from hypervisors.fake.world import (
    Store,
    StoredCheckpoint,
    StoredDisk,
    StoredMachine,
    StoredMemory,
    World,
)
from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, Conflict, NoSpace, NotFound, UsageError, WrongState
from inventory.sizes import format_size

_TOTAL = 2**40
_RESERVE = 2**28
_FLOOR_PART = 4  # the fake guest needs a fourth of its maximum


class FakeDisks:
    """Implements ``hypervisors.api.Disks``, ``FarmDisks``, ``GrowableDisks`` and ``LiveDisks``."""

    def __init__(
        self, farm: FarmIdentity, state: Path | None, *, step: StepFn = no_step, reserve: int = _RESERVE
    ) -> None:
        self._farm = farm
        self.store = Store(state)
        self._step = step
        self._reserve = reserve

    def seal(self, image: Path, template: Template) -> Template:
        with self.store.change() as world:
            if there := world.templates.get(template.label):
                raise label_taken(template.label, there.farm, self._farm)
            with image.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._step(f"seal template {template.label}")
            done = replace(template, ref=template.label, sha256=digest, farm=self._farm)
            world.templates[template.label] = done
        image.unlink()
        return done

    def templates(self) -> Sequence[Template]:
        with self.store.look() as world:
            found = world.templates.all().values()
        return sorted(found, key=lambda t: (t.name, t.generation))

    def remove_template(self, label: str) -> None:
        with self.store.change() as world:
            there = world.templates.get(label)
            if there is None:
                raise NotFound(f"no template {label}", remedy=(Call("template-list"), " shows them"))
            check_template(label, there.farm, self._farm)
            if users := [
                name for name, disk in world.disks.all().items()
                if any(kept.template == label for kept in disk.checkpoints.values())
            ]:  # fmt: skip
                raise template_in_use(label, users)
            self._step(f"remove template {label}")
            del world.templates[label]

    def adopt_template(self, label: str, whose: FarmIdentity) -> None:
        with self.store.change() as world:
            there = world.templates.get(label)
            if there is not None and there.farm == whose:
                self._step(f"mark template {label} as ours")
                world.templates[label] = replace(there, farm=self._farm)

    def find(self, machine: str) -> Disk | None:
        with self.store.look() as world:
            disk = world.disks.get(machine)
            return self._seen(machine, disk) if disk else None

    def list(self) -> Sequence[Disk]:
        with self.store.look() as world:
            return [self._seen(name, disk) for name, disk in world.disks.of(self._farm.id).items()]

    def others(self) -> Sequence[Foreign]:
        with self.store.look() as world:
            found = world.disks.all().items()
            return [
                Foreign(n, disk.owner) for n, disk in found if disk.owner.farm.is_namesake(self._farm)
            ]

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        with self.store.change() as world:
            disk = world.disks.get(machine)
            if disk is not None and disk.owner.farm == whose:
                self._step(f"mark the disk of {machine} as ours")
                disk.owner = Owner(self._farm, disk.owner.vm)

    def clone(self, template: Template, machine: str, owner: Owner, size: int) -> Disk:
        with self.store.change() as world:
            if size < template.size:
                raise UsageError(
                    f"{machine}: {format_size(size)} is smaller than template {template.label}"
                )
            if self.capacity().free < self._reserve:
                raise NoSpace(f"no room for the disk of {machine}", remedy=Call("gc"))
            there = world.templates.get(template.label)
            if there is None:
                raise NotFound(
                    f"no template {template.label}", remedy=(Call("template-list"), " shows them")
                )
            check_template(template.label, there.farm, self._farm)
            if machine in world.disks:
                raise Conflict(f"{machine} has a disk already", remedy="destroy it first")
            self._step(f"clone the disk of {machine} from {template.label}")
            clean = StoredCheckpoint(datetime.now(UTC), b"", template.label)
            world.disks[machine] = StoredDisk(
                owner, size, template.label, "clean", b"", {"clean": clean}
            )
            return self._seen(machine, world.disks[machine])

    def checkpoint(self, machine: str, name: str) -> Checkpoint:
        return self.checkpoint_all([machine], name)[machine]

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        with self.store.change() as world:
            disks = {machine: self._ours(world, machine) for machine in machines}
            for machine, disk in disks.items():
                if name in disk.checkpoints:
                    raise _name_taken(machine, name)
            self._step(f"freeze the disk of {', '.join(machines)} as {name}")
            made = datetime.now(UTC)
            return {machine: _keep(disk, name, made) for machine, disk in disks.items()}

    def before_live(self, machine: str, name: str) -> None:
        with self.store.look() as world:
            if name in self._ours(world, machine).checkpoints:
                raise _name_taken(machine, name)

    def checkpoint_live(self, machine: str, name: str, move: Callable[[Path], None]) -> Checkpoint:
        del move  # the content that is kept is another one than that which goes on being written to
        with self.store.change() as world:
            return _keep(self._ours(world, machine), name, datetime.now(UTC))

    def settle_live(self, machine: str, opened: Path | None) -> None:
        """There is nothing to finish: a change is written whole or not at all."""

    def restore(self, machine: str, name: str) -> Disk:
        return self.restore_all([machine], name)[0]

    def restore_all(self, machines: Sequence[str], name: str) -> Sequence[Disk]:
        with self.store.change() as world:
            disks = {machine: self._ours(world, machine) for machine in machines}
            for machine, disk in disks.items():
                if name not in disk.checkpoints:
                    raise NotFound(
                        f"{machine} has no checkpoint {name}",
                        remedy=f"it has: {', '.join(disk.checkpoints)}",
                    )
            self._step(f"swap in a fresh disk of {', '.join(machines)} from {name}")
            for disk in disks.values():
                disk.content, disk.base = disk.checkpoints[name].content, name
            return [self._seen(machine, disk) for machine, disk in disks.items()]

    def remove_checkpoint(self, machine: str, name: str) -> None:
        with self.store.change() as world:
            disk = self._ours(world, machine)
            check_removable(self._seen(machine, disk), name)
            self._step(f"remove checkpoint {name} of {machine}")
            del disk.checkpoints[name]

    def move(self, machine: str, template: Template) -> Disk:
        with self.store.change() as world:
            there, disk = world.templates.get(template.label), self._ours(world, machine)
            if there is None:
                raise NotFound(
                    f"no template {template.label}", remedy=(Call("template-list"), " shows them")
                )
            check_template(template.label, there.farm, self._farm)
            if disk.size < there.size:
                raise too_small(machine, disk.size, there)
            self._step(f"swap in a fresh disk of {machine} from {template.label}")
            rest = {name: kept for name, kept in disk.checkpoints.items() if name != "clean"}
            clean = StoredCheckpoint(datetime.now(UTC), b"", template.label)
            disk.checkpoints = {"clean": clean, **rest}
            disk.template, disk.base, disk.content = template.label, "clean", b""
            return self._seen(machine, disk)

    def enlarge(self, machine: str, size: int) -> Disk:
        with self.store.change() as world:
            disk = self._ours(world, machine)
            check_larger(self._seen(machine, disk), size)
            if self.capacity().free < self._reserve:
                raise NoSpace(f"no room for a larger disk of {machine}", remedy=Call("gc"))
            self._step(f"make the disk of {machine} {size} bytes large")
            disk.size = size
            return self._seen(machine, disk)

    def rename(self, machine: str, to: str, owner: Owner) -> Disk:
        with self.store.change() as world:
            check_one_of(machine, to, both=machine in world.disks and to in world.disks)
            there = machine if machine in world.disks else to
            disk = self._ours(world, there)
            if there != to or disk.owner != owner:
                self._step(f"rename the disk of {machine} to {to}")
                del world.disks[there]
                disk.owner = owner
                world.disks[to] = disk
            return self._seen(to, disk)

    def pristine(self, machine: str, name: str, *, quick: bool = False) -> bool:
        del quick  # it is anyway
        with self.store.look() as world:
            disk = self._ours(world, machine)
            return disk.base == name and disk.content == disk.checkpoints[name].content

    def destroy(self, machine: str) -> None:
        with self.store.change() as world:
            if machine in world.disks:
                self._ours(world, machine)
                self._step(f"remove the disk of {machine}")
                del world.disks[machine]

    def leftovers(self) -> Sequence[Leftover]:
        """A change is written whole or not at all, so nothing half-made stays."""
        return ()

    def discard(self, leftover: Leftover) -> None:
        raise NotFound(f"there is no leftover {leftover.ref}")

    def capacity(self) -> Capacity:
        with self.store.look() as world:
            return Capacity(_TOTAL, _TOTAL - world.used)

    def write(self, machine: str, content: bytes) -> None:
        """What a guest would have written since the template."""
        with self.store.change() as world:
            self._ours(world, machine).content = content

    def content(self, machine: str) -> bytes:
        """What a guest would read back."""
        with self.store.look() as world:
            return self._ours(world, machine).content

    def _ours(self, world: World, machine: str) -> StoredDisk:
        disk = world.disks.get(machine)
        if disk is None:
            raise NotFound(f"{machine} has no disk here", remedy=(Call("clone-farm"), " makes it"))
        if disk.owner.farm != self._farm:
            raise not_ours(f"the disk of {machine}", disk.owner, self._farm)
        return disk

    def _seen(self, machine: str, disk: StoredDisk) -> Disk:
        return Disk(
            machine=machine,
            owner=disk.owner,
            path=Path("/nonexistent/fake", machine),
            format="raw",
            size=disk.size,
            used=len(disk.content),
            template=disk.template,
            base=disk.base,
            checkpoints=tuple(_checkpoint(n, kept.made) for n, kept in disk.checkpoints.items()),
        )


class FakeHypervisor:
    """Implements ``hypervisors.api.Hypervisor`` over any disk store, and ``WarmMachines`` and
    ``SharingMachines`` over those that keep disks of paused machines (``LiveDisks``)."""

    def __init__(
        self, farm: FarmIdentity, disks: Disks, state: Path | None, *, step: StepFn = no_step
    ) -> None:
        self._farm = farm
        self._disks = disks
        # one file for both is one lock for both
        if isinstance(disks, FakeDisks) and state == disks.store.path:
            self._store = disks.store
        else:
            self._store = Store(state)
        self._step = step

    def capabilities(self) -> Capabilities:
        return Capabilities(
            driver="fake",
            accelerated=False,
            live_balloon=True,
            warm_checkpoints=isinstance(self._disks, LiveDisks),
            notes=("simulated: no machine runs",),
        )

    def find(self, name: str) -> Machine | None:
        with self._store.look() as world:
            fake = world.machines.get(name)
        return self._seen(fake) if fake else None

    def list(self) -> Sequence[Machine]:
        with self._store.look() as world:
            found = world.machines.of(self._farm.id)
        return [self._seen(fake) for fake in found.values()]

    def others(self) -> Sequence[Foreign]:
        found = {other.machine: other for other in self._disks.others()}
        with self._store.look() as world:
            for name, fake in world.machines.all().items():
                owner = fake.machine.owner
                if owner is not None and owner.farm.is_namesake(self._farm):
                    found[name] = Foreign(name, owner)
        return [found[name] for name in sorted(found)]

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        self._disks.adopt(machine, whose)
        with self._store.change() as world:
            fake = world.machines.get(machine)
            owner = fake.machine.owner if fake else None
            if fake and owner and owner.farm == whose:
                self._step(f"mark {machine} as ours")
                fake.machine = replace(fake.machine, owner=Owner(self._farm, owner.vm))

    def define(self, spec: MachineSpec, template: Template) -> Machine:
        self._check_name(spec.name)
        disk = self._disks.find(spec.name)
        if disk is not None and not is_fresh(self._disks, disk):
            raise disk_with_data(disk)
        if disk is not None and (disk.template, disk.size) != (template.label, spec.disk_size):
            self._disks.destroy(spec.name)
            disk = None
        made = disk is None
        if disk is None:
            disk = self._disks.clone(template, spec.name, spec.owner, spec.disk_size)
        machine = self._from(spec, disk.path, template.label)
        try:
            with self._store.change() as world:
                self._check_name(spec.name)
                self._step(f"define {spec.name}")
                world.machines[spec.name] = StoredMachine(machine, spec)
        except BaseException:
            if made:
                self._disks.destroy(spec.name)
            raise
        return machine

    def redefine(self, spec: MachineSpec) -> Machine:
        with self._store.change() as world:
            fake = self._ours(world, spec.name)
            if fake.machine.power is not Power.STOPPED:
                raise WrongState(f"{spec.name} is running", remedy=Call("stop", vm=spec.owner.vm))
            self._step(f"redefine {spec.name}")
            disk = self._disks.find(spec.name)
            template = disk.template if disk else fake.machine.template
            fake.machine = self._from(spec, fake.machine.disk, template)
            fake.spec = spec
            return fake.machine

    def rename(self, name: str, spec: MachineSpec) -> Machine:
        with self._store.look() as world:
            there = [one for one in (name, spec.name) if one in world.machines]
            for one in there:
                if self._ours(world, one).machine.power is not Power.STOPPED:
                    raise WrongState(f"{one} is running", remedy="stop it first")
        check_one_of(name, spec.name, both=len(there) > 1)
        disk = self._disks.rename(name, spec.name, spec.owner)
        now = there[0] if there else spec.name
        with self._store.change() as world:
            fake = self._ours(world, now)
            self._step(f"rename {name} to {spec.name}")
            del world.machines[now]
            fake.machine, fake.spec = self._from(spec, disk.path, disk.template), spec
            world.machines[spec.name] = fake
            return fake.machine

    def start(self, name: str, *, cold: bool = False) -> None:
        with self._store.look() as world:
            self._ours(world, name)
        if isinstance(self._disks, LiveDisks):
            self._disks.settle_live(name, None)
        ready = self._disks.ready if isinstance(self._disks, DeviceDisks) else self._disks.find
        disk = ready(name)
        if disk is None:
            raise NotFound(f"{name} has no disk", remedy=("destroy it, then ", Call("clone-farm")))
        base = "" if cold else self._suspended_at(name)
        with self._store.change() as world:
            fake = self._ours(world, name)
            if fake.machine.power is not Power.STOPPED:
                raise WrongState(
                    f"{name} is running already", remedy="stop it first, or use it as it is"
                )
            taken = world.taken(f.host for f in fake.spec.nic.forwards) if fake.spec else None
            if taken is not None:
                raise Conflict(f"start {name}: port {taken} of 127.0.0.1 is taken")
            if base and (trouble := fake.kept[base].trouble or fake.kept[base].hidden):
                raise WrongState(
                    f"the memory of {name}'s checkpoint {base} can't be used: {trouble}",
                    remedy="boot it instead, from that checkpoint's disk",
                )
            self._step(f"{'resume' if base else 'start'} {name}")
            fake.memory = fake.kept[base].word if base else f"booted {secrets.token_hex(4)}"
            fake.opened = str(disk.path)
            fake.machine = replace(
                fake.machine, power=Power.PAUSED if base else Power.RUNNING,
                current=fake.machine.memory, started=None if base else datetime.now(UTC),
            )  # fmt: skip
        if base:
            self._let_run(name)

    def _let_run(self, name: str) -> None:
        """One that has its memory back."""
        try:
            with self._store.change() as world:
                fake = self._ours(world, name)
                self._step(f"let {name} run on")
                fake.machine = replace(fake.machine, power=Power.RUNNING, started=datetime.now(UTC))
        except BaseException:
            with self._store.change() as world:
                self._off(self._ours(world, name))
            raise

    def stop(self, name: str, *, grace: float) -> None:
        with self._store.change() as world:
            fake = self._ours(world, name)
            if fake.machine.power is Power.STOPPED:
                return
            self._step(f"ask {name} to shut down" if grace > 0 else f"cut the power of {name}")
            self._off(fake)

    def checkpoint(self, name: str, checkpoint: str, *, warm: bool = False) -> Checkpoint:
        if warm:
            return self.checkpoint_all([name], checkpoint)[name]
        with self._store.look() as world:
            if self._ours(world, name).machine.power is not Power.STOPPED:
                raise WrongState(f"{name} is running: its checkpoints are cold", remedy="stop it first")
        return self._disks.checkpoint(name, checkpoint)

    # -- hypervisors.api.WarmMachines -------------------------------------------------------------

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        with self._store.look() as world:
            for machine in machines:
                power = self._ours(world, machine).machine.power
                if not isinstance(self._disks, LiveDisks):
                    raise no_warm(machine)
                if power is not Power.RUNNING:
                    raise WrongState(f"{machine} is {power}: only what runs has a memory to be kept")
        disks = self._disks
        assert isinstance(disks, LiveDisks)
        made: dict[str, Checkpoint] = {}
        try:
            for machine in machines:
                disks.before_live(machine, name)
            began = time.monotonic()
            self._pause(machines, name)
            for machine in machines:
                made[machine] = disks.checkpoint_live(machine, name, self._mover(machine))
            self._run_on(machines, name, time.monotonic() - began)
        finally:  # also where nobody wants it any more
            for machine in machines:
                self.settle(machine)
        return {machine: replace(kept, warm=True) for machine, kept in made.items()}

    def settle(self, machine: str) -> str:
        with self._store.look() as world:
            fake = self._ours(world, machine)
        runs = fake.machine.power in ON
        if isinstance(self._disks, LiveDisks):
            self._disks.settle_live(machine, Path(fake.opened) if runs else None)
        disk = self._disks.find(machine)
        ids = {one.name: one.id for one in disk.checkpoints} if disk else {}
        done: list[str] = []
        with self._store.change() as world:
            fake = self._ours(world, machine)
            if _is_half_started(fake):
                self._step(f"end {machine}, whose start was cut off")
                self._off(fake)
                done.append("it was being given its memory back: it is off, its disk unchanged")
            ours = not all(kept.of for kept in fake.kept.values())  # else an admin has paused it
            for name, kept in list(fake.kept.items()):
                if kept.of:
                    continue
                if name in ids:
                    self._step(f"keep the memory of {machine} as {name}")
                    kept.of = ids[name]
                    done.append(f"kept as {name}, disk and memory")
                else:
                    self._step(f"give the memory of {machine} for {name} up")
                    del fake.kept[name]
                    done.append(f"not kept as {name}")
            if ours and fake.machine.power is Power.PAUSED:
                self._step(f"let {machine} run on")
                fake.machine = replace(fake.machine, power=Power.RUNNING)
                done.append("runs on")
        return ", ".join(done)

    def memories(self, machine: str) -> Mapping[str, KeptMemory]:
        disk = self._disks.find(machine)
        ids = {one.name: one.id for one in disk.checkpoints} if disk else {}
        with self._store.look() as world:
            if machine not in world.machines:
                return {}
            fake = self._ours(world, machine)
            return {
                name: KeptMemory(
                    checkpoint=name, created=kept.created, how="mapped", size=kept.size,
                    vcpus=kept.vcpus, used=len(kept.word), pause=kept.pause, quiesced=False,
                    seal=hashlib.sha256(kept.word.encode()).hexdigest(), trouble=kept.trouble,
                )
                for name, kept in fake.kept.items() if kept.of and ids.get(name) == kept.of
            }  # fmt: skip

    def why_unusable(self, machine: str, checkpoint: str) -> str:
        with self._store.look() as world:
            kept = self._ours(world, machine).kept.get(checkpoint)
        return kept.trouble or kept.hidden if kept else "it is gone"

    def forget(self, machine: str, name: str) -> None:
        with self._store.change() as world:
            fake = self._ours(world, machine)
            kept = fake.kept.get(name)
            if kept is None:
                return
            if fake.machine.power in ON and fake.memory == kept.word:
                raise WrongState(f"{machine} uses the memory of {name}", remedy="stop it first")
            self._step(f"remove the memory of {machine}'s checkpoint {name}")
            del fake.kept[name]

    def memory_share(self, name: str) -> MemoryShare | None:
        """As long as it holds what it held when it was resumed, all of it is the checkpoint's."""
        with self._store.look() as world:
            fake = self._ours(world, name)
        if fake.machine.power not in ON:
            return None
        size = fake.machine.current
        shared = size if any(fake.memory == kept.word for kept in fake.kept.values()) else 0
        return MemoryShare(shared=shared, private=size - shared)

    def _pause(self, machines: Sequence[str], name: str) -> None:
        with self._store.change() as world:
            self._step(f"keep {', '.join(machines)}, disk and memory, as {name}")
            for machine in machines:
                fake = self._ours(world, machine)
                now = fake.machine
                fake.machine = replace(now, power=Power.PAUSED)
                fake.kept[name] = StoredMemory(
                    fake.memory, "", datetime.now(UTC), now.memory, now.vcpus, 0.0
                )

    def _run_on(self, machines: Sequence[str], name: str, pause: float) -> None:
        with self._store.change() as world:
            self._step(f"let {', '.join(machines)} run on")
            for machine in machines:
                fake = self._ours(world, machine)
                fake.kept[name].pause = pause
                fake.machine = replace(fake.machine, power=Power.RUNNING)

    def _mover(self, machine: str) -> Callable[[Path], None]:
        def move(file: Path) -> None:
            with self._store.change() as world:
                self._ours(world, machine).opened = str(file)

        return move

    def _suspended_at(self, name: str) -> str:
        """The warm checkpoint that the stopped machine's disk provably is; "" if it is none."""
        disk, kept = self._disks.find(name), self.memories(name)
        if disk is None or disk.base not in kept:
            return ""
        return disk.base if self._disks.pristine(name, disk.base) else ""

    def _seen(self, fake: StoredMachine) -> Machine:
        machine = fake.machine
        ours = machine.owner is not None and machine.owner.farm == self._farm
        if machine.power is Power.STOPPED and ours and fake.kept and self._suspended_at(machine.name):
            return replace(machine, power=Power.SUSPENDED)
        return machine

    def reset(self, name: str, checkpoint: str) -> None:
        with self._store.look() as world:
            self._ours(world, name)
        disk = self._disks.find(name)
        if disk is None or checkpoint not in (c.name for c in disk.checkpoints):
            raise NotFound(
                f"{name} has no checkpoint {checkpoint}", remedy=(Call("status"), " shows them")
            )
        with self._store.change() as world:
            fake = self._ours(world, name)
            if fake.machine.power is not Power.STOPPED:
                self._step(f"cut the power of {name}")
                self._off(fake)
        self._disks.restore(name, checkpoint)

    def balloon(self, name: str, target: int, *, timeout: float) -> int:
        del timeout  # a fake guest obeys at once
        with self._store.change() as world:
            fake = self._ours(world, name)
            machine = fake.machine
            if machine.power is not Power.RUNNING:
                raise _stopped(name)
            if target > machine.memory:
                raise UsageError(
                    f"{name} can't have {format_size(target)}: "
                    f"its maximum is {format_size(machine.memory)}"
                )
            if target < machine.memory // _FLOOR_PART:
                raise UsageError(f"{name} can't go down to {format_size(target)}: it needs more now")
            self._step(f"set the memory of {name} to {format_size(target)}")
            fake.machine = replace(machine, current=target)
            return target

    def memory(self, name: str) -> MemoryUse:
        with self._store.look() as world:
            machine = self._ours(world, name).machine
        if machine.power is not Power.RUNNING:
            raise _stopped(name)
        return MemoryUse(
            actual=machine.current, maximum=machine.memory, least=machine.memory // _FLOOR_PART
        )

    def console(self, name: str) -> Console:
        with self._store.look() as world:
            fake = self._ours(world, name)
            return Console(argv=(), log=fake.spec.console_log if fake.spec else None)

    def pulse(self, name: str) -> None:
        """It has no guest."""

    def destroy(self, name: str) -> None:
        with self._store.change() as world:
            if name in world.machines:
                self._off(self._ours(world, name))
                self._step(f"remove the definition of {name}")
                del world.machines[name]
        self._disks.destroy(name)

    def leftovers(self) -> Sequence[Leftover]:
        with self._store.look() as world:
            machines = world.machines.all()
        disks = {d.machine: d for d in self._disks.list()}
        found = list(self._disks.leftovers())
        for machine in self.list():
            if machine.name not in disks:
                found.append(_orphan("domain", machine.name, machine.owner, 0, "its disk is gone"))
        for name, disk in disks.items():
            if name not in machines:
                found.append(_orphan("disk", name, disk.owner, disk.used, without_machine(disk)))
        for machine, name, kept in self._stray():
            why = "its disk has no such checkpoint"
            ref = f"{machine.name}/{name}"
            found.append(_orphan("memory", ref, machine.owner, len(kept.word), why))
        return found

    def discard(self, leftover: Leftover) -> None:
        if leftover.kind == "memory":
            for one, name, _ in self._stray():
                if leftover.ref == f"{one.name}/{name}":
                    self.forget(one.name, name)
            return
        if leftover.kind not in {"domain", "disk"} or "/" in leftover.ref:
            self._disks.discard(leftover)
            return
        machine, disk = self.find(leftover.ref), self._disks.find(leftover.ref)
        owner = machine.owner if machine else disk.owner if disk else None
        if (machine is None) != (disk is None) and owner and owner.farm == self._farm:
            self.destroy(leftover.ref)

    def close(self) -> None:
        """It holds nothing open between calls."""

    def memory_of(self, name: str) -> str:
        """What its guest would find in its memory; "": it is off."""
        with self._store.look() as world:
            return self._ours(world, name).memory

    def remember(self, name: str, word: str) -> None:
        """What a running guest would have put there."""
        with self._store.change() as world:
            self._ours(world, name).memory = word

    def damage(self, name: str, checkpoint: str, trouble: str, *, hidden: bool = False) -> None:
        """What becomes of a kept memory on a real host: its file is cut short, or QEMU is another.
        ``hidden``: a quick look doesn't show it, such as other bytes in it."""
        with self._store.change() as world:
            kept = self._ours(world, name).kept[checkpoint]
            kept.trouble, kept.hidden = ("", trouble) if hidden else (trouble, "")

    def peak(self) -> int:
        """Bytes: the most that machines which ran at once ever had, by this host's own count."""
        with self._store.look() as world:
            return world.peak

    def add_foreign(self, name: str) -> None:
        """A machine that isn't farmhand's, as an admin might have made by hand."""
        with self._store.change() as world:
            machine = Machine(
                name=name, owner=None, power=Power.STOPPED, memory=2**28, current=2**28, vcpus=1,
                mac="", disk=None, spec_hash="", template="",
            )  # fmt: skip
            world.machines[name] = StoredMachine(machine, None)

    def _check_name(self, name: str) -> None:
        with self._store.look() as world:
            if existing := world.machines.get(name):
                owner = existing.machine.owner
                if owner is None or owner.farm != self._farm:
                    raise not_ours(name, owner, self._farm)
                raise Conflict(f"{name} exists already", remedy="destroy it first")

    def _ours(self, world: World, name: str) -> StoredMachine:
        fake = world.machines.get(name)
        if fake is None:
            raise NotFound(f"there is no machine {name}", remedy=(Call("clone-farm"), " makes it"))
        owner = fake.machine.owner
        if owner is None or owner.farm != self._farm:
            raise not_ours(name, owner, self._farm)
        return fake

    def _stray(self) -> Sequence[tuple[Machine, str, StoredMemory]]:
        """Memories of our machines whose checkpoint isn't there any more; none that is being made."""
        with self._store.look() as world:
            machines = world.machines.of(self._farm.id).values()
        found = []
        for fake in machines:
            disk = self._disks.find(fake.machine.name) if fake.kept else None
            there = {(one.name, one.id) for one in disk.checkpoints} if disk else set()
            found += [
                (fake.machine, name, kept) for name, kept in fake.kept.items()
                if kept.of and (name, kept.of) not in there
            ]  # fmt: skip
        return found

    def _off(self, fake: StoredMachine) -> None:
        fake.memory = fake.opened = ""
        fake.machine = replace(
            fake.machine, power=Power.STOPPED, current=fake.machine.memory, started=None
        )

    def _from(self, spec: MachineSpec, disk: Path | None, template: str) -> Machine:
        return Machine(
            name=spec.name,
            owner=spec.owner,
            power=Power.STOPPED,
            memory=spec.memory,
            current=spec.memory,
            vcpus=spec.vcpus,
            mac=spec.nic.mac,
            disk=disk,
            spec_hash=spec_hash(spec),
            template=template,
            address=spec.address,
        )


def _keep(disk: StoredDisk, name: str, made: datetime) -> Checkpoint:
    template = disk.checkpoints[disk.base].template  # one from before a move has another one
    disk.checkpoints[name] = StoredCheckpoint(made, disk.content, template)
    disk.base = name
    return _checkpoint(name, made)


def _checkpoint(name: str, made: datetime) -> Checkpoint:
    return Checkpoint(name=name, created=made, id=made.isoformat())


def _name_taken(machine: str, name: str) -> Conflict:
    return Conflict(f"{machine} has a checkpoint {name} already", remedy="give it another name")


def _is_half_started(fake: StoredMachine) -> bool:
    """Whether whoever gave it its memory back was killed: it never ran."""
    return fake.machine.power is Power.PAUSED and fake.machine.started is None


def _stopped(name: str) -> WrongState:
    return WrongState(f"{name} is stopped: only a running guest's memory can change")


def _orphan(kind: str, name: str, owner: Owner | None, size: int, why: str) -> Leftover:
    return Leftover(kind=kind, ref=name, owner=owner, created=datetime.now(UTC), bytes=size, why=why)
