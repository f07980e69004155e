"""boot-unit: the systemd unit that starts a farm's VMs at boot, installed and removed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from provision.boot_unit import BootUnit, boot_unit, check_ours, install, uninstall
from provision.engine.facts import Facts
from provision.engine.operation import Activity, Operation, Recovery
from provision.engine.plan import Plan, alone, job
from provision.engine.record import Record
from provision.engine.run import Run
from provision.site import Site

_LOCK = "boot-unit"


@dataclass(frozen=True, slots=True)
class BootUnitFacts(Facts):
    """``file``: the unit's."""

    file: str


class _BootUnitActivity(Activity[BootUnitFacts]):
    """It can be done again, and ``status`` tells where nothing starts VMs."""

    facts = BootUnitFacts

    def locks(self, _site: Site, _record: Record, _facts: BootUnitFacts) -> tuple[str, ...]:
        return (_LOCK,)

    def recover(
        self, _site: Site, _record: Record, facts: BootUnitFacts
    ) -> Recovery[BootUnitFacts]:  # fmt: skip
        return Recovery(f"noted; the same again does the rest with {facts.file}")


class _UnitInstallActivity(_BootUnitActivity):
    name = "boot-unit-install"


class _UnitRemoveActivity(_BootUnitActivity):
    name = "boot-unit-remove"


INSTALL, REMOVE = _UnitInstallActivity(), _UnitRemoveActivity()


@dataclass(frozen=True, slots=True)
class BootUnitResult:
    """The unit's file."""

    file: Path


@dataclass(frozen=True, slots=True)
class BootUnitInstall(Operation[BootUnitResult]):
    """Write the unit and enable it, for the next boot. ``root``: where the system to boot is.

    Errors: NotOurs (a file of its name isn't ours), UsageError (a path can't be written in a unit),
    CommandFailed (systemd isn't here), Busy."""

    name = "boot-unit-install"
    root: Path = Path("/")

    def locks(self, _site: Site) -> tuple[str, ...]:
        return (_LOCK,)

    def plan(self, run: Run) -> Plan[BootUnitResult]:
        unit = boot_unit(run.site.farm, root=self.root)
        check_ours(unit)
        result = BootUnitResult(unit.file)
        lingers = "; an ordinary user's units do so if he lingers: loginctl enable-linger"
        text = f"{unit.file}: enabled, VMs with 'autostart: yes' start at boot"
        text += lingers if unit.scope == "user" else ""
        if unit.is_installed:
            return Plan([alone(job("keep", "", text))], lambda: result)
        return Plan([alone(job("install", "", text, partial(_install, run, unit)))], lambda: result)


def _install(run: Run, unit: BootUnit) -> None:
    with run.site.journal.begin(INSTALL, [], BootUnitFacts(str(unit.file))) as entry:
        entry.step(f"write and enable {unit.file}")
        install(unit, run.site.runner)


@dataclass(frozen=True, slots=True)
class BootUnitRemove(Operation[BootUnitResult]):
    """Disable and remove the unit; VMs that run go on. ``root``: where the system to boot is.

    Errors: as of BootUnitInstall."""

    name = "boot-unit-remove"
    root: Path = Path("/")

    def locks(self, _site: Site) -> tuple[str, ...]:
        return (_LOCK,)

    def plan(self, run: Run) -> Plan[BootUnitResult]:
        unit = boot_unit(run.site.farm, root=self.root)
        check_ours(unit)
        result = BootUnitResult(unit.file)
        if not unit.file.exists():
            return Plan([alone(job("keep", "", f"{unit.file}: not there"))], lambda: result)
        gone = job("remove", "", f"{unit.file}: disabled and removed", partial(_remove, run, unit))
        return Plan([alone(gone)], lambda: result)


def _remove(run: Run, unit: BootUnit) -> None:
    with run.site.journal.begin(REMOVE, [], BootUnitFacts(str(unit.file))) as entry:
        entry.step(f"disable and remove {unit.file}")
        uninstall(unit, run.site.runner)
