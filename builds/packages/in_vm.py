"""One build in one builder VM: reset and proven, pointed to what it installs from, built in, and what it
made fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from builds.machines import Machines
from builds.packages.formats import build_format
from builds.packages.inputs import InstalledPackage
from builds.packages.order import BuildOrder
from builds.packages.record import ARTIFACTS, BuilderRecord, packages_of
from builds.record import FileRecord
from builds.repository_client import point_to, reached_by
from builds.step_run import StepFailed, StepLog
from host.files import check_room, make_directory
from provision.guest.ssh_connection import in_thread

if TYPE_CHECKING:
    from repositories.generation import Generation
    from repositories.repository import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltInVm:
    """``outputs``: below the record's ``artifacts/``."""

    builder: BuilderRecord
    outputs: tuple[FileRecord, ...]


async def build_in(
    machines: Machines,
    vm: str,
    order: BuildOrder,
    repository: Repository,
    generation: Generation | None,
    log: StepLog,
    *,
    build: str,
    directory: Path,
    begun: Callable[[tuple[InstalledPackage, ...]], None],
) -> BuiltInVm:
    """``machines`` has begun with the VM. ``generation``: what is installed comes from that; None: the
    repository has nothing yet. ``build``: whose the VM's list of the repository is. ``directory``: the
    record's. ``begun``: told what is installed, with the sums of what is ours, when the build begins;
    what it raises ends it. StepFailed; FarmhandError, for whoever asked to judge."""
    await machines.reset(vm, order.settings.to, log.say)
    connection = await machines.connection(vm)
    if generation is not None:
        source = await reached_by(machines, vm, repository, generation)
        log.say(f"{vm} gets generation {generation.sequence} of {repository.name}: {source.url}")
        await point_to(machines, vm, repository, source, build=build, log=log, seconds=order.seconds)

    def known() -> dict[tuple[str, str, str], str]:
        packages = repository.packages(generation) if generation else ()
        return {package.identity: package.sha256 for package in packages}

    sums = await in_thread(known)

    def ours(one: InstalledPackage) -> str:
        """A template may have a package of that very version, made by somebody else."""
        sum_ = sums.get((one.name, one.version, one.architecture), "")
        return sum_ if one.listed in (None, sum_) else ""

    async def before(installed: tuple[InstalledPackage, ...]) -> None:
        begun(tuple(replace(one, sha256=ours(one)) for one in installed))

    log.mark()
    with machines.meter.guest():
        built = await build_format(order.state.format).build(connection, order, log, before)
    check_room(directory, sum(file.size for file in built.files))
    make_directory(directory / ARTIFACTS, mode=0o755)
    outputs = []
    for file in built.files:
        with machines.meter.guest():
            connection = await machines.connection(vm)
            await connection.get(file, directory / ARTIFACTS)
        outputs.append(
            FileRecord(
                name=file.name, size=file.size, sha256=file.sha256, vm=vm,
                path=f"{ARTIFACTS}/{file.name}", flow="out",
            )
        )  # fmt: skip
    if not packages_of(outputs):
        raise StepFailed("source", "its build made no package")
    known_vm = machines.records[vm]
    builder = replace(
        built.builder, vm=vm, host=known_vm.host, driver=known_vm.driver, template=known_vm.template,
        checkpoint=known_vm.checkpoint, pristine=known_vm.pristine, boot_id=known_vm.boot_id,
        memory=known_vm.memory or built.builder.memory,
        tools=known_vm.tools, memory_seal=known_vm.memory_seal, beyond_proof=known_vm.beyond_proof,
    )  # fmt: skip
    return BuiltInVm(builder=builder, outputs=tuple(outputs))
