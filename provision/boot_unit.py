"""A systemd unit that starts a farm's VMs when this machine boots, and shuts them down before it does.

It is farmhand's own start, on every driver. The hypervisor's autostart would come before block devices
are made ready and before what a power cut left half done is recovered; and nobody starts a private
daemon at boot. The unit is never written but by the operation that says so
(``operations/boot_unit.py``)."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from host.files import write_atomic
from host.paths import cache_dir, runtime_dir, state_dir
from host.program import absolute_program
from host.run import Runner
from inventory.errors import Call, NotOurs, Text, UsageError
from inventory.model import Farm

_STOP = 600
"""Seconds for all VMs to shut down before systemd goes on without them."""


@dataclass(frozen=True, slots=True)
class BootUnit:
    """``scope``: "system", or "user" for an ordinary user's, whose units systemd starts at boot only if
    he lingers (loginctl(1)). ``root``: where the system to boot is."""

    file: Path
    text: str
    scope: str
    root: Path

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def mark(self) -> str:
        """Its first line, which says whose it is."""
        return self.text.partition("\n")[0]

    @property
    def target(self) -> str:
        """That starts it at boot."""
        return _target(self.scope)

    @property
    def is_enabled(self) -> bool:
        """Whether systemd starts it at boot. A file alone, whose enabling was cut off, is not enough."""
        return self.file.exists() and os.path.lexists(
            self.file.with_name(f"{self.target}.wants") / self.name
        )

    @property
    def is_installed(self) -> bool:
        """Whether it is enabled, and as this farmhand writes it."""
        return self.is_enabled and _text(self.file) == self.text


def boot_unit(farm: Farm, *, root: Path = Path("/")) -> BootUnit:
    """The unit of that farm, for this user. UsageError where a path can't be written in a unit.
    ``root``: where the system to boot is."""
    system = os.geteuid() == 0
    scope = "system" if system else "user"
    home = Path(pwd.getpwuid(os.geteuid()).pw_dir)
    place = Path("/etc/systemd/system") if system else home / ".config/systemd/user"
    program, file = _quoted(absolute_program()), _quoted(str(farm.path))
    places = {"STATE": state_dir(), "CACHE": cache_dir()}
    if "FARMHAND_RUNTIME_DIR" in os.environ:  # else it is a directory of the session's or of the boot's
        places["RUNTIME"] = runtime_dir()
    mounts = " ".join(dict.fromkeys(map(_quoted, (str(farm.path.parent), str(places["STATE"])))))
    lines = [
        f"# farmhand: of the farm in {farm.path}",
        "[Unit]",
        f"Description=Build VMs of farm {farm.farm}",
        *(["Wants=network-online.target", "After=network-online.target libvirtd.service"] * system),
        *([f"RequiresMountsFor={mounts}"] * system),
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        *(["User=root"] * system),
        *(f"Environment={_quoted(f'FARMHAND_{name}_DIR={path}')}" for name, path in places.items()),
        f"ExecStart={program} start --autostart --no-wait --farm {file}",
        f"ExecStop={program} stop --all --farm {file}",
        "TimeoutStartSec=infinity",
        f"TimeoutStopSec={_STOP}",
        "",
        "[Install]",
        f"WantedBy={_target(scope)}",
    ]
    path = root / place.relative_to("/") / f"farmhand-{farm.farm}.service"
    return BootUnit(path, "\n".join(lines) + "\n", scope, root)


def install(unit: BootUnit, runner: Runner) -> None:
    """Write the unit and enable it, for the next boot. CommandFailed where systemd isn't here."""
    unit.file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(unit.file, unit.text.encode(), mode=0o644)
    _systemctl(runner, unit, "enable")


def uninstall(unit: BootUnit, runner: Runner) -> None:
    """Disable the unit, then remove it; VMs that run go on."""
    _systemctl(runner, unit, "disable")
    unit.file.unlink()


def unstarted(farm: Farm) -> Text:
    """What to say where VMs are to start at boot and nothing does that; "" if all is well."""
    try:
        if not any(vm.autostart for vm in farm.vms.values()) or boot_unit(farm).is_enabled:
            return ""
    except UsageError as error:
        return f"nothing starts VMs at this machine's boot: {error.message}"
    return "nothing starts VMs at this machine's boot: ", Call("boot-unit", install=True)


def check_ours(unit: BootUnit) -> None:
    """NotOurs if a file of its name isn't this farm's."""
    if unit.file.exists() and _text(unit.file).partition("\n")[0] != unit.mark:
        raise NotOurs(
            f"{unit.file} is not this farm's: left alone",
            remedy="move it away, or give the farm another name",
        )


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _target(scope: str) -> str:
    return "multi-user.target" if scope == "system" else "default.target"


def _systemctl(runner: Runner, unit: BootUnit, verb: str) -> None:
    whose = ("--user",) if unit.scope == "user" else ()
    where = () if unit.root == Path("/") else (f"--root={unit.root}",)
    runner.change("systemctl", *whose, *where, "--quiet", verb, unit.name)


def _quoted(text: str) -> str:
    """As systemd.syntax(7) has it: % begins a specifier. A $ means another thing from place to place."""
    if not text.isprintable() or "$" in text:
        raise UsageError(f"{text!r} can't be named in a systemd unit", remedy="give it a plain name")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
